"""TRL's trainers with our log-probabilities in place of TRL's own."""

import sys
import types

import pytest
import torch
from models import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import varstream as vs
from varstream.integrations import trl as hook
from varstream.integrations.transformers.head import fuse_head
from varstream.integrations.trl import LogProbs, UnsupportedTRLError
from varstream.testing import assert_error_ratio, assert_exact, peak_memory, relative_error

trl = pytest.importorskip("trl")
utils = pytest.importorskip("trl.trainer.utils")
Original = pytest.importorskip("trl.kernels").ChunkedLogProbFunction

N, D, V = 19, 6, 41
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def _put_back():
    yield
    utils._ChunkedLogProbFunction = Original


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of our function."""
    seen = []
    original = LogProbs.apply

    def apply(*args):
        seen.append(args)
        return original(*args)

    monkeypatch.setattr(LogProbs, "apply", apply)
    return seen


# --- the function ---------------------------------------------------------------------------------


def operands(dtype=torch.float32, bias=False, n=N):
    hidden = torch.randn(n, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    b = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, b, torch.randint(V, (n,))


def both(inputs, *options):
    """Values and gradients of TRL's function and ours under the same random upstream gradients."""
    leaves = [t for t in inputs[:3] if t is not None]
    upstream = torch.randn(2, inputs[0].shape[0])
    results = []
    for function in (Original, LogProbs):
        values = function.apply(*inputs, *options)
        differentiable = [v for v in values[:2] if v is not None]
        total = sum((v * u).sum() for v, u in zip(differentiable, upstream, strict=False))
        results.append((values, torch.autograd.grad(total, leaves)))
    return results


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "temperature, softcap, scale", [(1.0, None, 1.0), (0.7, None, 2.0), (1.3, 2.0, 0.5)]
)
def test_values_and_gradients(bias, temperature, softcap, scale):
    """TRL accumulates in float32, whatever it is given."""
    inputs = operands(bias=bias)
    (want, expected), (got, grads) = both(inputs, temperature, 16, softcap, scale, OUTPUTS)
    for name, ours, theirs in zip(("log_probs", *OUTPUTS), got, want, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        assert ours.requires_grad == theirs.requires_grad, name
        assert_exact(ours, theirs, 1e-5, name)
    for ours, theirs in zip(grads, expected, strict=True):
        assert_exact(ours, theirs, 1e-5)


def test_float64_stays_float64():
    inputs = operands(torch.float64, bias=True)
    (want, expected), (got, grads) = both(inputs, 0.9, 16, 3.0, 2.0, OUTPUTS)
    hidden, weight, bias, targets = inputs
    logits = 3.0 * torch.tanh(2.0 * (hidden @ weight.t() + bias) / 3.0) / 0.9
    logp = logits.log_softmax(-1)
    dense = (
        logp.gather(1, targets[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        (2 * logp).logsumexp(-1),
        logits.mean(-1),
        logits.argmax(-1) == targets,
    )
    for ours, theirs, exact in zip(got, want, dense, strict=True):
        assert_exact(ours, exact)
        assert relative_error(theirs, exact) < 1e-5
    for ours, theirs in zip(grads, expected, strict=True):
        assert_exact(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    "outputs",
    [(), ("log_probs",), ("entropy",), ("mean_logits",), ("entropy", "is_top1"), OUTPUTS[1:]],
)
def test_only_what_was_asked_for(outputs):
    want, got = (f.apply(*operands(), 1.0, 16, None, 1.0, outputs) for f in (Original, LogProbs))
    assert [v is None for v in got] == [v is None for v in want]


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    (want, expected), (got, grads) = both(operands(n=n), 1.0, 16)
    for ours, theirs in zip(got + grads, want + expected, strict=True):
        assert ours.shape == theirs.shape
        assert_exact(ours, theirs, 1e-5)


def test_is_top1_of_ties_is_the_first():
    hidden, weight, _, _ = operands()
    targets = torch.arange(N)
    arguments = hidden, torch.zeros_like(weight), None, targets, 1.0, 16
    want, got = (f.apply(*arguments)[4] for f in (Original, LogProbs))
    assert torch.equal(got, want) and torch.equal(got, targets == 0)


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "float32_weight", "float32_hidden"])
def test_low_precision(how):
    low, wide = torch.bfloat16, torch.float32
    hidden, weight, bias, targets = operands(bias=True, n=101)
    hidden = hidden.detach().to(wide if how in ("autocast", "float32_hidden") else low)
    weight = weight.detach().to(low if how in ("bfloat16", "float32_hidden") else wide)
    inputs = hidden.requires_grad_(), weight.requires_grad_(), bias, targets
    with torch.autocast("cpu", low, enabled=how == "autocast"):
        (plain, expected), (got, grads) = both(inputs, 0.8, 16, None, 1.0, ("entropy",))
    doubled = [t.detach().double().requires_grad_() for t in inputs[:3]]
    torch.manual_seed(0)
    exact = LogProbs.apply(*doubled, targets, 0.8, 16, None, 1.0, ("entropy",))
    for ours, theirs, reference in zip(got[:2], plain[:2], exact[:2], strict=True):
        assert ours.dtype == theirs.dtype == wide
        assert_error_ratio(ours, theirs, reference)
    for ours, theirs in zip(grads, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_exact(ours, theirs, 2e-2)


def test_no_logits():
    n, classes = 4096, 4096
    hidden = torch.randn(n, D, requires_grad=True)
    weight = torch.randn(classes, D, requires_grad=True)
    targets = torch.randint(classes, (n,))

    def step():
        logp, *_ = LogProbs.apply(hidden, weight, None, targets, 1.0, 32768)
        return torch.autograd.grad(logp.sum(), (hidden, weight))

    assert peak_memory(step) < n * classes * 4 / 4


def test_call_errors():
    inputs = operands()
    with pytest.raises(ValueError, match="outputs must be among entropy.*got 'varentropy'"):
        LogProbs.apply(*inputs, 1.0, 16, None, 1.0, ("entropy", "varentropy"))
    targets = torch.full((N,), V)  # TRL's own returns minus the log-sum-exp here
    with pytest.raises(ValueError, match=rf"target must hold classes in \[0, {V}\)"):
        LogProbs.apply(*inputs[:3], targets, 1.0, 16)
    inputs[1].ds_id = 3
    with pytest.raises(ValueError, match="weight is partitioned by DeepSpeed ZeRO-3"):
        LogProbs.apply(*inputs, 1.0, 16)
    with torch.no_grad():
        assert LogProbs.apply(*inputs, 1.0, 16)[0].shape == (N,)


# --- installing -----------------------------------------------------------------------------------


def test_install_and_uninstall():
    hook.uninstall()
    assert utils._ChunkedLogProbFunction is Original
    hook.install()
    hook.install()
    assert utils._ChunkedLogProbFunction is LogProbs
    with hook.installed():
        assert utils._ChunkedLogProbFunction is LogProbs
    assert utils._ChunkedLogProbFunction is LogProbs
    hook.uninstall()
    assert utils._ChunkedLogProbFunction is Original
    with pytest.raises(KeyError), hook.installed():
        assert utils._ChunkedLogProbFunction is LogProbs
        raise KeyError
    assert utils._ChunkedLogProbFunction is Original


def other_signature(ctx, hidden, weight):
    """Stands for a later TRL's."""


def other_user():
    """Doesn't read the global."""


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda m: m.delattr(utils, "_ChunkedLogProbFunction"),
            "_ChunkedLogProbFunction is missing",
        ),
        (lambda m: m.setattr(utils, "_ChunkedLogProbFunction", 5), "has been replaced by 5"),
        (
            lambda m: m.setattr(Original, "forward", other_signature),
            r"takes \(ctx, hidden, weight\)",
        ),
        (
            lambda m: m.setattr(utils, "add_fused_lm_head", other_user),
            "add_fused_lm_head doesn't call",
        ),
        (lambda m: m.delattr(utils, "add_fused_lm_head"), "add_fused_lm_head doesn't call"),
        (
            lambda m: m.setattr(sys.modules[Original.__module__], "OPTIONAL_OUTPUTS", ("entropy",)),
            r"computes \('entropy',\)",
        ),
        (
            lambda m: m.setitem(sys.modules, "trl.kernels", types.ModuleType("trl.kernels")),
            "trl.kernels.ChunkedLogProbFunction is missing",
        ),
    ],
)
def test_unknown_layouts_are_refused(change, message):
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        before = getattr(utils, "_ChunkedLogProbFunction", None)
        with pytest.raises(UnsupportedTRLError, match=f"TRL {trl.__version__} .*{message}"):
            hook.install()
        assert getattr(utils, "_ChunkedLogProbFunction", None) is before


def test_trl_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    for call in (hook.install, hook.uninstall):
        with pytest.raises(ImportError, match="varstream.integrations.trl needs TRL"):
            call()


# --- the trainers ---------------------------------------------------------------------------------

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]


def tokenizer():
    vocab = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def reward(completions, **_):
    return [float(len(set(text))) + text.count("a") for text in completions]


ROWS = {
    "SFT": [{"prompt": "a b c", "completion": " d e f g"}, {"prompt": "k", "completion": " x y"}],
    "DPO": [
        {"prompt": "a b c", "chosen": " d e", "rejected": " f g h"},
        {"prompt": "k l", "chosen": " x", "rejected": " y z"},
    ],
    "KTO": [
        {"prompt": "a b c", "completion": " d e", "label": True},
        {"prompt": "k l", "completion": " y z", "label": False},
    ],
    "GRPO": [{"prompt": "a b c"}, {"prompt": "k l"}],
    "RLOO": [{"prompt": "a b c"}, {"prompt": "k l"}],
}
ONLINE = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
OPTIONS = {
    "SFT": {"completion_only_loss": True},
    "DPO": {"use_weighting": True, "loss_type": ["sigmoid"]},
    "KTO": {},
    "GRPO": ONLINE | {"temperature": 0.8, "entropy_coef": 0.1},
    "RLOO": ONLINE,
}


def train_one_step(name, model, path, rows=None, **changes):
    """Loss and gradients of one optimizer step."""
    from datasets import Dataset

    config, trainer_class = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    options = {
        "output_dir": str(path),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_grad_norm": 0.0,
        **OPTIONS[name],
        **changes,
    }
    more = {"reward_funcs": reward} if name in ("GRPO", "RLOO") else {}
    trainer = trainer_class(
        model=model,
        args=config(**options),
        train_dataset=Dataset.from_list(rows or ROWS[name]),
        processing_class=tokenizer(),
        **more,
    )
    gradients = {}

    def keep(*_, **__):
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters()})

    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    logs = trainer.state.log_history[0]
    return {k: v for k, v in logs.items() if "time" not in k and "per_second" not in k}, gradients


@pytest.mark.slow
@pytest.mark.parametrize("patch", [vs.stream, fuse_head])
def test_patched_models(patch, calls, tmp_path):
    """TRL calls the backbone itself: a streamed one streams, a fused head is passed by."""
    hook.install()
    results = []
    for change in (lambda model: model, patch):
        torch.manual_seed(3)
        model = make_model(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1)
        results.append(train_one_step("SFT", change(model), tmp_path))
    assert len(calls) == 2
    (logs, expected), (got, gradients) = results
    assert got["loss"] == pytest.approx(logs["loss"], rel=1e-5)
    for key, gradient in gradients.items():
        assert_exact(gradient, expected[key], 1e-4, key)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_sft_packs_for_a_streamed_model(packing, tmp_path):
    rows = [{"input_ids": [(7 * i + j) % 12 + 3 for j in range(3 + i % 9)]} for i in range(16)]
    results = []
    for change in (lambda model: model, lambda model: vs.stream(model, chunk_size=7)):
        torch.manual_seed(3)
        model = change(make_model("qwen3", vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1))
        options = {"packing": packing, "max_length": 16, "completion_only_loss": None}
        results.append(train_one_step("SFT", model, tmp_path, rows, **options))
    (logs, expected), (got, gradients) = results
    assert got["loss"] == pytest.approx(logs["loss"], rel=1e-5)
    for key, gradient in gradients.items():
        assert_exact(gradient, expected[key], 1e-4, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_trainers(name, calls, tmp_path):
    """One step of each trainer: the same logs and gradients with and without the hook."""
    results = []
    model = make_model(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1)
    model.save_pretrained(tmp_path / "model")  # reference models are loaded again from there
    for ours in (False, True):
        model = type(model).from_pretrained(tmp_path / "model")
        if ours:
            hook.install()
        results.append(train_one_step(name, model, tmp_path / "run"))
        assert bool(calls) == ours
    (logs, expected), (got, gradients) = results
    assert got.keys() == logs.keys() and "loss" in got and expected
    for key, value in logs.items():
        assert got[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    for key, gradient in gradients.items():
        assert_exact(gradient, expected[key], 1e-4, key)
