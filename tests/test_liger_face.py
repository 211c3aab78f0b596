"""Liger's function, module and causal loss against their formulas in dense float64."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from varstream.integrations.liger import (
    CrossEntropyOutput,
    LigerForCausalLMLoss,
    LigerFusedLinearCrossEntropyLoss,
    liger_fused_linear_cross_entropy,
)
from varstream.testing import assert_error_ratio, assert_exact, peak_memory

N, D, V = 23, 7, 37
IGNORE = -100


def operands(n=N, bias=False, dtype=torch.float64, ignored=0.3):
    x = torch.randn(n, D, dtype=dtype, requires_grad=True)
    w = torch.randn(V, D, dtype=dtype, requires_grad=True)
    b = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    target = torch.randint(V, (n,)).masked_fill(torch.rand(n) < ignored, IGNORE)
    return x, w, target, b


def dense(
    x,
    w,
    target,
    bias=None,
    ce_weight=None,
    ignore_index=IGNORE,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction="mean",
    softcap=None,
    use_token_scaling=False,
):
    """loss, z term, accuracy, argmax as documented; every row's loss and z term are scaled."""
    z = x @ w.t() if bias is None else x @ w.t() + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    valid = target != ignore_index
    safe = target.clamp(min=0)
    logp, lse = z.log_softmax(-1), z.logsumexp(-1)
    classes = torch.ones(V, dtype=z.dtype) if ce_weight is None else ce_weight
    picked = logp.gather(1, safe[:, None])[:, 0]
    loss = -(1 - label_smoothing) * classes[safe] * picked
    loss = loss - label_smoothing / V * (logp * classes).sum(-1)
    term = lse_square_scale * lse.square()
    if reduction == "mean":
        loss, term = loss / classes[safe][valid].sum(), term / valid.sum()
    scale = picked.exp().detach() if use_token_scaling else 1.0
    loss, term = ((torch.where(valid, scale * t, 0.0)) for t in (loss + term, term))
    hits = (z.argmax(-1) == target).to(z.dtype)
    if reduction == "none":
        return loss, term, hits, z.argmax(-1).masked_fill(~valid, -1)
    return (
        loss.sum(),
        term.sum(),
        hits.sum() / valid.sum(),
        z.argmax(-1).masked_fill(~valid, -1),
    )


def compare(inputs, **options):
    x, w, target, b = inputs
    want = dense(*inputs, **options)
    got = liger_fused_linear_cross_entropy(
        *inputs,
        **options,
        return_z_loss=True,
        return_token_accuracy=True,
        return_predicted_tokens=True,
    )
    assert type(got) is CrossEntropyOutput
    assert_exact(got.loss, want[0])
    assert_exact(got.z_loss, want[1])
    assert_exact(got.token_accuracy, want[2])
    assert torch.equal(got.predicted_tokens, want[3])
    assert not any(t.requires_grad for t in (got.z_loss, got.token_accuracy))
    leaves = [t for t in (x, w, b) if t is not None]
    upstream = torch.randn_like(want[0])
    expected = torch.autograd.grad(want[0], leaves, upstream)
    for grad, reference in zip(
        torch.autograd.grad(got.loss, leaves, upstream), expected, strict=True
    ):
        assert_exact(grad, reference)
    alone = liger_fused_linear_cross_entropy(*inputs, **options)
    assert torch.equal(alone, got.loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [0.0, 1e-2])
@pytest.mark.parametrize("scaled", [False, True])
def test_formula(reduction, smoothing, scale, scaled):
    compare(
        operands(bias=scaled),
        reduction=reduction,
        label_smoothing=smoothing,
        lse_square_scale=scale,
        use_token_scaling=scaled,
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    ignored=st.floats(0.0, 0.9),
    bias=st.booleans(),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    scale=st.sampled_from([0.0, 1e-3, 0.5]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    scaled=st.booleans(),
)
def test_any_combination(n, ignored, bias, weighted, reduction, smoothing, scale, softcap, scaled):
    inputs = operands(n, bias, ignored=ignored)
    inputs[2][0] = 5  # something is trained: an empty mean is a test of its own
    compare(
        inputs,
        ce_weight=torch.rand(V, dtype=torch.float64) + 0.1 if weighted else None,
        reduction=reduction,
        label_smoothing=smoothing,
        lse_square_scale=scale,
        softcap=softcap,
        use_token_scaling=scaled,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_class_weights_and_softcap(reduction, softcap):
    compare(
        operands(bias=True),
        ce_weight=torch.rand(V, dtype=torch.float64) + 0.1,
        reduction=reduction,
        label_smoothing=0.2,
        lse_square_scale=1e-3,
        softcap=softcap,
        use_token_scaling=softcap is not None,
    )


@pytest.mark.parametrize("n", [1, 2, 13])
@pytest.mark.parametrize("budget", [1, 2, 1000])
def test_sizes_and_chunks(n, budget):
    inputs = operands(n, ignored=0.0)
    got = liger_fused_linear_cross_entropy(*inputs, lse_square_scale=0.1, chunk_mem_const=budget)
    assert_exact(got, dense(*inputs, lse_square_scale=0.1)[0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n", [0, 5])
def test_nothing_trained(reduction, scaled, n):
    """Everything is 0, also what Liger divides by the number of valid rows."""
    x, w, target, _ = operands(n, ignored=2.0)
    got = liger_fused_linear_cross_entropy(
        x,
        w,
        target,
        reduction=reduction,
        lse_square_scale=0.1,
        use_token_scaling=scaled,
        return_z_loss=True,
        return_token_accuracy=True,
        return_predicted_tokens=True,
    )
    got.loss.backward()
    assert got.loss == 0 and got.z_loss == 0 and got.token_accuracy == 0
    assert (got.predicted_tokens == -1).all() and got.predicted_tokens.shape == (n,)
    assert not x.grad.any() and not w.grad.any()


@pytest.mark.parametrize("returned", ["z_loss", "token_accuracy", "predicted_tokens"])
def test_only_what_was_asked_for(returned):
    got = liger_fused_linear_cross_entropy(*operands(), **{f"return_{returned}": True})
    for name in ("z_loss", "token_accuracy", "predicted_tokens"):
        assert (getattr(got, name) is not None) == (name == returned)


def test_other_ignore_index():
    x, w, target, _ = operands()
    shifted = target.masked_fill(target == IGNORE, 5)
    want = dense(x, w, torch.where(shifted == 5, IGNORE, shifted))[0]
    assert_exact(liger_fused_linear_cross_entropy(x, w, shifted, ignore_index=5), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision(dtype):
    inputs = operands(101, dtype=dtype)
    options = {"label_smoothing": 0.1, "lse_square_scale": 1e-2, "use_token_scaling": True}
    options["reduction"] = "none"
    x, w, target, _ = inputs
    doubled = x.detach().double().requires_grad_(), w.detach().double().requires_grad_(), target
    got = liger_fused_linear_cross_entropy(*inputs, **options, return_z_loss=True)
    assert got.loss.dtype == got.z_loss.dtype == torch.float32
    upstream = torch.rand(101)
    results = {}
    for name, loss, leaves in (
        ("ours", got.loss, (x, w)),
        ("plain", dense(*inputs, **options)[0], (x, w)),
        ("exact", dense(*doubled, **options)[0], doubled[:2]),
    ):
        grads = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
        results[name] = (loss, *grads)
    for ours, plain, exact in zip(*results.values(), strict=True):
        assert_error_ratio(ours, plain, exact)


def test_module_takes_the_weight_first():
    x, w, target, b = operands(bias=True)
    options = {"label_smoothing": 0.1, "softcap": 4.0, "ce_weight": torch.rand(V).double()}
    loss = LigerFusedLinearCrossEntropyLoss(**options)(w, x, target, b)
    assert_exact(loss, dense(x, w, target, b, **options)[0])
    output = LigerFusedLinearCrossEntropyLoss(return_z_loss=True, lse_square_scale=0.1)(
        w, x, target
    )
    assert_exact(output.z_loss, dense(x, w, target, lse_square_scale=0.1)[1])


def test_signatures():
    """Argument names and order are the interface."""
    function = list(inspect.signature(liger_fused_linear_cross_entropy).parameters)
    names = (
        "input weight target bias ce_weight ignore_index lse_square_scale label_smoothing "
        "reduction softcap return_z_loss accum_dtype use_token_scaling return_token_accuracy "
        "return_predicted_tokens chunk_mem_const"
    )
    assert " ".join(function) == names
    module = list(inspect.signature(LigerFusedLinearCrossEntropyLoss).parameters)
    assert module == function[4:-1]


@pytest.mark.parametrize("count", [None, 9, torch.tensor(9)])
@pytest.mark.parametrize("given", ["labels", "shift_labels"])
def test_causal_loss(count, given):
    from transformers.loss.loss_utils import ForCausalLMLoss

    hidden = torch.randn(3, 8, D, requires_grad=True)
    w = torch.randn(V, D, requires_grad=True)
    labels = torch.randint(V, (3, 8)).masked_fill(torch.rand(3, 8) < 0.3, IGNORE)
    arguments = (
        {"labels": labels} if given == "labels" else {"labels": None, "shift_labels": labels}
    )
    want = ForCausalLMLoss(hidden @ w.t(), vocab_size=V, num_items_in_batch=count, **arguments)
    got = LigerForCausalLMLoss(
        hidden, w, hidden_size=D, num_items_in_batch=count, position_ids=None, **arguments
    )
    assert_exact(got, want, 1e-6)
    expected = torch.autograd.grad(want, (hidden, w))
    for grad, reference in zip(torch.autograd.grad(got, (hidden, w)), expected, strict=True):
        assert_exact(grad, reference, 1e-5)


def test_causal_loss_passes_arguments_on():
    hidden, w = torch.randn(2, 6, D).double(), torch.randn(V, D).double()
    labels = torch.randint(V, (2, 6))
    flat = nn.functional.pad(labels, (0, 1), value=IGNORE)[:, 1:].reshape(-1)
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.1, "use_token_scaling": True}
    got = LigerForCausalLMLoss(
        hidden,
        w,
        labels,
        D,
        num_items_in_batch=4,
        final_logit_softcapping=2.0,
        return_token_accuracy=True,
        return_predicted_tokens=True,
        **options,
    )
    want = dense(hidden.reshape(-1, D), w, flat, softcap=2.0, reduction="sum", **options)
    assert_exact(got.loss, want[0] / 4)
    assert_exact(got.token_accuracy, want[2])
    assert torch.equal(got.predicted_tokens, want[3])


def test_no_logits():
    n, classes = 1024, 4096
    x = torch.randn(n, D, requires_grad=True)
    w = torch.randn(classes, D, requires_grad=True)
    target = torch.randint(classes, (n,))

    def step():
        loss = liger_fused_linear_cross_entropy(
            x, w, target, use_token_scaling=True, chunk_mem_const=8
        )
        return torch.autograd.grad(loss, (x, w))

    assert peak_memory(step) < n * classes * 4 / 4


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"accum_dtype": torch.bfloat16},
            ValueError,
            "accum_dtype must be None or torch.float64.*bfloat16",
        ),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0 or None, got 0.0"),
        ({"softcap": "3"}, TypeError, "softcap must be a number"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be <= 1.0, got 1.5"),
        ({"lse_square_scale": float("inf")}, ValueError, "lse_square_scale must be finite"),
        ({"lse_square_scale": -1.0}, ValueError, "lse_square_scale must be >= 0.0, got -1.0"),
        ({"return_z_loss": 1}, TypeError, "return_z_loss must be a bool"),
        ({"return_token_accuracy": 1}, TypeError, "return_token_accuracy must be a bool"),
        ({"return_predicted_tokens": 1}, TypeError, "return_predicted_tokens must be a bool"),
        ({"use_token_scaling": None}, TypeError, "use_token_scaling must be a bool"),
        ({"chunk_mem_const": 0}, ValueError, "chunk_mem_const must be >= 1, got 0"),
        ({"reduction": "batch"}, ValueError, "reduction must be one of"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "target must have size 23"),
        ({"target": [0] * N}, TypeError, "target must be a torch.Tensor, got list"),
        (
            {"target": torch.zeros(N)},
            ValueError,
            "target must have dtype int64, int32, got float32",
        ),
        ({"input": None}, TypeError, "input must be a torch.Tensor, got NoneType"),
        ({"weight": torch.zeros(V, D + 1)}, ValueError, "weight must have size 7 in dimension 1"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"ce_weight": torch.ones(V + 1)}, ValueError, "ce_weight must have size 37"),
        ({"ignore_index": float("nan")}, TypeError, "ignore_index must be an int, got float"),
        ({"ignore_index": -100.0}, TypeError, "ignore_index must be an int, got float"),
        (
            {"ignore_index": torch.tensor(-100)},
            TypeError,
            "ignore_index must be an int, got Tensor",
        ),
    ],
)
def test_errors(change, error, message):
    x, w, target, _ = operands()
    with pytest.raises(error, match=message):
        liger_fused_linear_cross_entropy(**({"input": x, "weight": w, "target": target} | change))


def test_causal_loss_needs_labels():
    with pytest.raises(ValueError, match="labels or shift_labels must be given"):
        LigerForCausalLMLoss(torch.randn(1, 2, D), torch.randn(V, D), None, D)


LABELS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden_states": [[0.0]]}, TypeError, "hidden_states must be a torch.Tensor, got list"),
        ({"hidden_states": LABELS}, ValueError, "hidden_states must have dtype float64"),
        ({"hidden_states": torch.zeros(D)}, ValueError, "hidden_states must have at least 2 dim"),
        ({"lm_head_weight": None}, TypeError, "lm_head_weight must be a torch.Tensor"),
        ({"lm_head_weight": torch.zeros(V, 5)}, ValueError, "lm_head_weight must have size 7"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be >= 1, got 0"),
        ({"hidden_size": -1}, ValueError, "hidden_size must be >= 1, got -1"),
        ({"hidden_size": 7.0}, TypeError, "hidden_size must be an int, got float"),
        ({"hidden_size": 5}, ValueError, "hidden_size must be the last size .* 7, got 5"),
        ({"labels": [0] * 6}, TypeError, "^labels must be a torch.Tensor, got list"),
        ({"labels": LABELS[0, 0]}, ValueError, r"^labels must have one label .* 6, got shape \(\)"),
        ({"labels": LABELS.float()}, ValueError, "^labels must have dtype int64, int32"),
        ({"labels": LABELS[:1]}, ValueError, "^labels must have one label per hidden state"),
        ({"shift_labels": 3}, TypeError, "shift_labels must be a torch.Tensor, got int"),
        ({"shift_labels": LABELS[0, 0]}, ValueError, "shift_labels must have one label"),
        ({"ignore_index": float("nan")}, TypeError, "ignore_index must be an int, got float"),
        ({"ignore_index": torch.tensor(0)}, TypeError, "ignore_index must be an int, got Tensor"),
    ],
)
def test_causal_loss_errors(change, error, message):
    given = {"hidden_states": torch.randn(2, 3, D), "lm_head_weight": torch.randn(V, D)}
    given |= {"labels": LABELS, "hidden_size": D}
    with pytest.raises(error, match=message):
        LigerForCausalLMLoss(**(given | change))


def test_accum_dtype_of_ours_is_taken():
    x, w, target, _ = operands()
    got = liger_fused_linear_cross_entropy(x, w, target, accum_dtype=torch.float64)
    assert_exact(got, dense(x, w, target)[0])
