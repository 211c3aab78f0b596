"""Bad input to the head: each wrong argument is refused by name, with its contract and value."""

import pytest
import torch
from head_cases import problem

import varstream as vs


def arguments(changes):
    p = problem(dtype=torch.float32)
    given = dict(input=p.input, linear_weight=p.weight, target=p.target, linear_bias=p.bias)
    return given | changes


LOSS = {
    "input_type": (dict(input=[1.0]), TypeError, "input must be a torch.Tensor, got list"),
    "input_ndim": (
        dict(input=torch.zeros(2, 3, 9)),
        ValueError,
        r"input must have 2 dimensions \(N, d\), got shape \(2, 3, 9\)",
    ),
    "input_dtype": (
        dict(input=torch.zeros(16, 9).int()),
        ValueError,
        "input must have dtype.*int32",
    ),
    "weight_type": (dict(linear_weight=None), TypeError, "linear_weight must be a torch.Tensor"),
    "weight_ndim": (
        dict(linear_weight=torch.zeros(23, 4, 9)),
        ValueError,
        r"linear_weight must have 2 dimensions \(V, d\), got shape \(23, 4, 9\)",
    ),
    "weight_width": (
        dict(linear_weight=torch.zeros(23, 8)),
        ValueError,
        r"linear_weight must have size 9 in dimension 1 \(V, d\), got shape \(23, 8\)",
    ),
    "weight_empty": (dict(linear_weight=torch.zeros(0, 9)), ValueError, "at least one class"),
    "weight_dtype": (
        dict(linear_weight=torch.zeros(23, 9, dtype=torch.bfloat16)),
        ValueError,
        "linear_weight must have the dtype of input .*float32.*bfloat16",
    ),
    "weight_device": (
        dict(linear_weight=torch.zeros(23, 9, device="meta")),
        ValueError,
        "linear_weight must be on cpu like the other tensors, got meta",
    ),
    "bias_shape": (
        dict(linear_bias=torch.zeros(9)),
        ValueError,
        r"linear_bias must have size 23 in dimension 0 \(V,\), got shape \(9,\)",
    ),
    "bias_dtype": (
        dict(linear_bias=torch.zeros(23).double()),
        ValueError,
        "linear_bias must have the dtype of input",
    ),
    "target_type": (dict(target=3), TypeError, "target must be a torch.Tensor, got int"),
    "target_shape": (
        dict(target=torch.zeros(15).long()),
        ValueError,
        r"target must have size 16 in dimension 0 \(N,\) or \(N, K\), got shape \(15,\)",
    ),
    "target_dtype": (
        dict(target=torch.zeros(16, dtype=torch.int16)),
        ValueError,
        "target must have dtype int64, int32, got int16",
    ),
    "target_extra_dims": (
        dict(target=torch.zeros(16, 2, 2).long()),
        ValueError,
        r"target must have 1 or 2 dimensions \(N,\) or \(N, K\), got shape \(16, 2, 2\)",
    ),
    "target_too_large": (
        dict(target=torch.tensor([0, 23] + [1] * 14)),
        ValueError,
        r"target must hold classes in \[0, 23\) or ignore_index=-100, got 23 at row 1",
    ),
    "target_negative": (
        dict(target=torch.tensor([-1] + [1] * 15)),
        ValueError,
        "got -1 at row 0",
    ),
    "probabilities": (
        dict(target=torch.zeros(16, 23)),
        ValueError,
        r"target must hold class indices.*class probabilities are not supported, got float32",
    ),
    "ignore_index": (dict(ignore_index="0"), TypeError, "ignore_index must be an int, got str"),
    "logit_scale": (dict(logit_scale="1"), TypeError, "logit_scale must be a number, got str"),
    "logit_scale_inf": (dict(logit_scale=float("inf")), ValueError, "logit_scale must be finite"),
    "softcap": (dict(softcap=-1.0), ValueError, "softcap must be >= 0.0, got -1.0"),
    "temperature": (dict(temperature=0.0), ValueError, "temperature must be above 0, got 0.0"),
    "temperature_low": (dict(temperature=-1), ValueError, "temperature must be above 0, got -1"),
    "chunk_size": (dict(chunk_size=0), ValueError, "chunk_size must be >= 1, got 0"),
    "chunk_size_type": (dict(chunk_size=2.0), TypeError, "chunk_size must be an int, got float"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of mean, sum, none"),
    "normalizer_sum": (
        dict(reduction="sum", normalizer=3),
        ValueError,
        "normalizer needs reduction='mean', got reduction='sum'",
    ),
    "normalizer_shape": (
        dict(normalizer=torch.ones(2)),
        ValueError,
        r"normalizer must have one element, got shape \(2,\)",
    ),
    "normalizer_negative": (dict(normalizer=-1), ValueError, "normalizer must be >= 0.0, got -1"),
    "normalizer_type": (dict(normalizer="3"), TypeError, "normalizer must be a number, got str"),
    "target_too_large_2d": (
        dict(target=torch.tensor([[0, 1]] * 3 + [[2, 30]] + [[0, -100]] * 12)),
        ValueError,
        r"target must hold classes in \[0, 23\).*got 30 at row 3, column 1",
    ),
    "weight_list": (dict(weight=[1.0]), TypeError, "weight must be a torch.Tensor, got list"),
    "weight_integers": (
        dict(weight=torch.ones(23).long()),
        ValueError,
        "^weight must have dtype float64, float32, bfloat16, float16, got int64",
    ),
    "weight_shape": (
        dict(weight=torch.ones(22)),
        ValueError,
        r"^weight must have size 23 in dimension 0 \(V,\), got shape \(22,\)",
    ),
    "weight_grad": (
        dict(weight=torch.ones(23, requires_grad=True)),
        ValueError,
        "^weight must not require gradients.*requires_grad=True",
    ),
    "weight_meta": (
        dict(weight=torch.ones(23, device="meta")),
        ValueError,
        "^weight must be on cpu like the other tensors, got meta",
    ),
    "token_weight_type": (dict(token_weight=1.0), TypeError, "token_weight must be a torch.Tensor"),
    "token_weight_shape": (
        dict(token_weight=torch.ones(16, 1)),
        ValueError,
        r"token_weight must have 1 dimensions like target, got shape \(16, 1\)",
    ),
    "token_weight_dtype": (
        dict(token_weight=torch.ones(16).bool()),
        ValueError,
        "token_weight must have dtype float64, float32, bfloat16, float16, got bool",
    ),
    "token_weight_grad": (
        dict(token_weight=torch.ones(16, requires_grad=True)),
        ValueError,
        "token_weight must not require gradients",
    ),
    "label_smoothing": (
        dict(label_smoothing=1.5),
        ValueError,
        "label_smoothing must be <= 1.0, got 1.5",
    ),
    "label_smoothing_low": (
        dict(label_smoothing=-0.1),
        ValueError,
        "label_smoothing must be >= 0.0, got -0.1",
    ),
    "label_smoothing_type": (
        dict(label_smoothing=True),
        TypeError,
        "label_smoothing must be a number, got bool",
    ),
    "z_loss": (dict(z_loss=-1e-4), ValueError, "z_loss must be >= 0.0, got -0.0001"),
    "z_loss_type": (dict(z_loss=None), TypeError, "z_loss must be a number, got NoneType"),
    "return_metrics": (
        dict(return_metrics=1),
        TypeError,
        "return_metrics must be a bool, got int",
    ),
    "ignore_index_wraps": (
        dict(target=torch.zeros(16, dtype=torch.int32), ignore_index=2**32 + 3),
        ValueError,
        r"ignore_index must fit the dtype of target \(torch.int32\), got 4294967299",
    ),
    "ignore_index_large": (dict(ignore_index=2**70), ValueError, "ignore_index must fit"),
    "sparse": (
        dict(input=torch.zeros(16, 9).to_sparse()),
        ValueError,
        "input must be a dense, strided tensor, got torch.sparse_coo",
    ),
    "normalizer_complex": (
        dict(normalizer=torch.tensor(2 + 1j)),
        ValueError,
        "normalizer must have a real dtype, got torch.complex64",
    ),
    "normalizer_bool": (
        dict(normalizer=torch.tensor(True)),
        ValueError,
        "normalizer must have a real dtype, got torch.bool",
    ),
    "options_type": (
        dict(options={"batch_chunk_size": 4}),
        TypeError,
        r"options must be a torch.nn.LinearCrossEntropyOptions \(torch >= 2.13\) or None, got dict",
    ),
}


@pytest.mark.parametrize("changes, error, message", LOSS.values(), ids=LOSS)
def test_linear_cross_entropy(changes, error, message):
    with pytest.raises(error, match=message):
        vs.linear_cross_entropy(**arguments(changes))


def head_calls():
    """The three operators as functions of their input (16, 9)."""
    given = arguments({})
    given.pop("input")
    teacher = torch.randn(16, 9), torch.randn(23, 9)
    weight = given["linear_weight"].detach()
    return {
        "loss": lambda x: vs.linear_cross_entropy(x, **given),
        "none": lambda x: vs.linear_cross_entropy(x, **given, reduction="none").sum(),
        "logprobs": lambda x: vs.token_logprobs(x, **given).sum(),
        "distillation": lambda x: vs.objectives.distillation(x, weight, *teacher),
    }


@pytest.mark.parametrize("name", ["loss", "none", "logprobs", "distillation"])
def test_transforms_and_forward_mode_are_refused(name):
    """torch would return a tangent of 0, or lose the gradient of a batched tensor."""
    call, x = head_calls()[name], torch.randn(16, 9)
    with pytest.raises(TypeError, match="input must be a plain tensor: torch.func.*inside vmap"):
        torch.func.vmap(call)(torch.stack([x, x]))
    with pytest.raises(TypeError, match="input must be a plain tensor: torch.func.*inside grad"):
        torch.func.grad(call)(x)
    with pytest.raises(TypeError, match="input must be a plain tensor: torch.func"):
        torch.func.jvp(call, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(TypeError, match="input must be a plain tensor: forward-mode"):
            call(dual)
        call(x)


# The checks shared with linear_cross_entropy are tested one by one there.
LOGPROBS = {
    "input_ndim": (dict(input=torch.zeros(9)), ValueError, "input must have 2 dimensions"),
    "weight_dtype": (
        dict(linear_weight=torch.zeros(23, 9, dtype=torch.float16)),
        ValueError,
        "linear_weight must have the dtype of input",
    ),
    "bias_shape": (dict(linear_bias=torch.zeros(2)), ValueError, "linear_bias must have size 23"),
    "target_large": (
        dict(target=torch.tensor([0] * 15 + [99], dtype=torch.int32)),
        ValueError,
        r"target must hold classes in \[0, 23\) or ignore_index=-100, got 99 at row 15",
    ),
    "probabilities": (
        dict(target=torch.zeros(16, 23)),
        ValueError,
        r"target must hold class indices.*class probabilities are not supported, got float32",
    ),
    "temperature": (dict(temperature=0), ValueError, "temperature must be above 0"),
    "softcap": (dict(softcap=None), TypeError, "softcap must be a number, got NoneType"),
    "logit_scale": (dict(logit_scale=float("nan")), ValueError, "logit_scale must be finite"),
    "ignore_index": (dict(ignore_index=1.0), TypeError, "ignore_index must be an int, got float"),
    "chunk_size": (dict(chunk_size=-3), ValueError, "chunk_size must be >= 1, got -3"),
    "return_entropy": (dict(return_entropy=1), TypeError, "return_entropy must be a bool, got int"),
    "return_stats": (dict(return_stats="1"), TypeError, "return_stats must be a bool, got str"),
}


@pytest.mark.parametrize("changes, error, message", LOGPROBS.values(), ids=LOGPROBS)
def test_token_logprobs(changes, error, message):
    with pytest.raises(error, match=message):
        vs.token_logprobs(**arguments(changes))


OPTIONS = {
    "compact": (dict(acc_policy="compact"), {}, "options.acc_policy must be one of.*'compact'"),
    "balanced": (dict(acc_policy="balanced"), {}, "options.acc_policy must be one of.*'balanced'"),
    "acc_dtype": (
        dict(acc_dtype=torch.float64),
        {},
        "options.acc_dtype must be None or torch.float32 for torch.float32 inputs, got.*float64",
    ),
    "chunking_method": (
        dict(chunking_method="aspect_ratio:2"),
        {},
        "options.chunking_method must be 'auto' or None.*got 'aspect_ratio:2'",
    ),
    "two_sizes": (
        dict(batch_chunk_size=4),
        dict(chunk_size=8),
        "chunk_size and options.batch_chunk_size must agree.*got 8 and 4",
    ),
}


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch >= 2.13")
@pytest.mark.parametrize("fields, changes, message", OPTIONS.values(), ids=OPTIONS)
def test_options_that_are_not_honoured(fields, changes, message):
    options = torch.nn.LinearCrossEntropyOptions(**fields)
    with pytest.raises(ValueError, match=message):
        vs.linear_cross_entropy(**arguments(changes), options=options)


DIRECT = {
    "class_weight": (11, torch.zeros(22), "class_weight must have size 23"),
    "nll_scale": (12, torch.zeros(15), "nll_scale must have size 16"),
    "smooth_scale": (13, torch.zeros(16, 1), "smooth_scale must have 1 dimensions"),
    "lse_sq_scale": (14, torch.zeros(1), "lse_sq_scale must have 0 dimensions"),
}


@pytest.mark.parametrize("place, value, message", DIRECT.values(), ids=DIRECT)
def test_direct_calls_check_the_scales(place, value, message):
    p = problem(dtype=torch.float32)
    call = [p.input, p.weight, p.bias, p.target, -100, 1.0, 0.0, 1.0, 4, *[None] * 6, *[False] * 4]
    call[place] = value
    with pytest.raises(RuntimeError, match=f"varstream::linear_cross_entropy: {message}"):
        torch.ops.varstream.linear_cross_entropy(*call)


DIRECT_BACKWARD = {
    "dlogp": ({0: torch.zeros(15)}, "dlogp must have size 16"),
    "dentropy": ({1: torch.zeros(15), 4: torch.zeros(16)}, "dentropy must have size 16"),
    "dlse": ({2: torch.zeros(15)}, "dlse must have size 16"),
    "dclass_sum": ({3: torch.zeros(16, 1)}, "dclass_sum must have 1 dimensions"),
    "entropy": ({1: torch.zeros(16)}, "dentropy needs entropy, got None"),
    "entropy_shape": ({4: torch.zeros(3)}, "entropy must have size 16"),
    "class_weight": ({16: torch.zeros(3)}, "class_weight must have size 23"),
}


@pytest.mark.parametrize("changes, message", DIRECT_BACKWARD.values(), ids=DIRECT_BACKWARD)
def test_direct_calls_of_the_backward(changes, message):
    p = problem(dtype=torch.float32)
    call = [*[None] * 5, p.input, p.weight, p.bias, p.target, -100, 1.0, 0.0, 1.0, 4, *[None] * 3]
    for place, value in changes.items():
        call[place] = value
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"token_logprobs_bwd: {message}"):
        torch.ops.varstream.token_logprobs_bwd(*call, True, True, True)
