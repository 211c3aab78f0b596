"""The GPU's cases of the head, as far as a machine without one can tell: shapes, bars, operation
counts, and that ours and the peers that run here agree at the small shapes."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import ModuleType

import emulation
import pytest
import torch
from bench import head_divergences as divergences
from bench import head_grid as grid
from bench import head_reference as reference
from bench import head_ways as ways
from bench import peers
from bench.case import Setup
from bench.cases import all_cases, head_rows
from bench.runner import Options, _check, judged, run_case
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import varstream as vs
from varstream.testing import relative_error

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

CPU = torch.device("cpu")
CASES = {name: case for name, case in all_cases().items() if "/bf16_gpu" in name}
LOSSES = {name: case for name, case in CASES.items() if case.topic == "head"}
SIZES = grid.sizes(300, 24, 70)
PAIR_SIZES = SIZES | {"teacher_width": 40}
# Ways that neither compile nor need a package or keyword that may not be there.
PLAIN = ("varstream", "dense", "checkpointed_chunks")
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def close(found, wanted, tolerance=grid.TOLERANCE):
    return [relative_error(a, b) <= tolerance for a, b in zip(found, wanted, strict=True)]


def limits(name, metric):
    return [bar.limit for bar in CASES[name].bars if bar.metric == metric]


# Tensors that a run returns: values and gradients.
RESULTS = {
    "head/bf16_gpu_frozen": 2,
    "logprobs/bf16_gpu_inference": 1,
    "logprobs/bf16_gpu_inference_entropy": 2,
    "logprobs/bf16_gpu_entropy": 4,
}


# --- the cases ------------------------------------------------------------------------------------


def test_the_shapes_are_those_promised():
    shapes = {tuple(case.shape.values()) for case in LOSSES.values()}
    assert shapes == {
        *((rows, 4096, 128256) for rows in (1024, 2048, 4096, 8192, 16384)),
        (8192, 2304, 256000),
        (8192, 4096, 151936),
        (4096, 1024, 32000),
    }
    assert {name.partition("/")[0] for name in CASES} == {"head", "logprobs", "distillation"}


def test_the_bars_are_those_promised():
    time = {name: limits(name, "time/gemm_floor") for name in CASES}
    assert {name: found[0] for name, found in time.items() if found} == {
        "head/bf16_gpu": 1.08,
        "head/bf16_gpu_classes_256000": 1.10,
        "head/bf16_gpu_none": 1.08,
        "logprobs/bf16_gpu_inference_entropy": 1.12,
        "logprobs/bf16_gpu_plain": 1.08,
        "logprobs/bf16_gpu_entropy": 1.08,
    }
    for name, case in CASES.items():
        assert limits(name, "beyond_gradients_gib") == [1.05]
        assert all(bar.device == "H100" for bar in case.bars if bar.run)


@pytest.mark.parametrize(("device", "barred"), [(H100, True), (A100, False)])
def test_a_bar_on_time_is_one_of_its_device(device, barred):
    entry = {
        "environment": {"device": {"name": device}},
        "status": "ok",
        "runs": {"varstream": {}, "gemm_floor": {"ratio": {"median": 1.09}}},
        "figures": {"beyond_gradients_gib": 1.0},
    }
    found = judged(CASES["head/bf16_gpu"], entry)
    memory = {"limit": 1.05, "reached": 1.0, "holds": True}
    time = {"limit": 1.08, "reached": 1.09, "holds": False}
    assert found == {"beyond_gradients_gib": memory} | ({"time/gemm_floor": time} if barred else {})


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_sound(name):
    case = CASES[name]
    assert case.devices == ("cuda",) and case.dtype == "bfloat16"
    assert set(case.sizes(quick=True)) == set(case.shape)
    missing = {peer.name for peer in case.peers if peer.needs("cuda")}
    here = {peer.name for peer in case.peers} - missing
    assert {"dense", "dense_compiled", "checkpointed_chunks", "gemm_floor"} <= here
    assert len({peer.name for peer in case.peers}) == len(case.peers)


def test_the_peers_are_those_promised():
    everything = {*ways.LOSSES, "gemm_floor"} - {"varstream"}
    assert {peer.name for peer in CASES["head/bf16_gpu"].peers} == everything
    assert {peer.name for peer in CASES["logprobs/bf16_gpu_plain"].peers} == {
        *ways.LOGPROBS,
        "gemm_floor",
    } - {"varstream"}
    quack = {name: case.availability("cuda")["quack"] for name, case in LOSSES.items()}
    assert quack["head/bf16_gpu_none"] == "has no losses of single rows"
    tunes = {name for name, reason in quack.items() if reason and reason.startswith("tunes")}
    assert tunes == {n for n in LOSSES if not limits(n, "time/gemm_floor")}
    reasons = CASES["head/bf16_gpu"].availability("cuda")
    for name, package in (("liger", "liger_kernel"), ("quack", "quack")):
        if peers.module(package)("cuda"):
            assert f"{package}" in str(reasons[name]) and "is not installed" in str(reasons[name])


@pytest.mark.parametrize("name", CASES)
def test_ours_and_the_peers_that_run_here_agree(name):
    case = CASES[name]
    setup: Setup = case.build(case.sizes(quick=True), CPU, 0)
    assert {peer.name for peer in case.peers} | {"varstream", "float32"} <= set(setup.runs)
    here = [p.name for p in case.peers if p.needs("cpu") is None and p.role != "floor"]
    here = ["varstream", *(n for n in here if n != "dense_compiled")]
    unavailable: dict[str, str] = {}
    checked = _check(case, setup, here, unavailable, CPU, lambda phase: None)
    assert not unavailable and set(checked.errors) == set(here)
    assert set(PLAIN) <= set(here)
    assert len(checked.ours) == RESULTS.get(name, 3)


@pytest.mark.parametrize("name", CASES)
def test_the_floor_is_the_products_and_nothing_else(name):
    case = CASES[name]
    setup: Setup = case.build(case.sizes(quick=True), CPU, 0)
    with FlopCounterMode(display=False) as counted:
        setup.runs["gemm_floor"]()
    assert counted.get_total_flops() == setup.flops


def test_operations_by_hand():
    def found(name):
        case = CASES[name]
        return case.build(case.sizes(quick=True), CPU, 0).flops

    product = 2 * 304 * 32 * 520
    assert found("head/bf16_gpu") == 3 * product
    assert found("head/bf16_gpu_frozen") == 2 * product
    assert found("head/bf16_gpu_none") == found("logprobs/bf16_gpu_entropy") == 4 * product
    assert found("logprobs/bf16_gpu_inference") == product
    assert 0.4 < found("head/bf16_gpu_ignored_half") / (3 * product) < 0.6
    assert found("distillation/bf16_gpu_kl") == 3 * product + 2 * 304 * 48 * 520


def test_memory_figures():
    x, weight = (torch.zeros(n, 8, dtype=torch.bfloat16) for n in (4, 16))
    peak = {"varstream": 4 * 8 * 2 + 16 * 8 * 4 + 2**30}
    found = grid.figures(peak, [x, weight], 4, 16)
    assert found["beyond_gradients_gib"] == 1.0
    assert found["beyond_returned_gib"] == 1.0 + 16 * 8 * 2 / 2**30
    assert found["memory_over_logits"] == (2**30 + 16 * 8 * 2) / (4 * 16 * 2)
    assert grid.figures({"varstream": 2**29}, [], 4, 16)["beyond_gradients_gib"] == 0.5
    frozen = grid.figures({"varstream": 4 * 8 * 2 + 2**30}, [x], 4, 16)
    assert frozen["beyond_gradients_gib"] == frozen["beyond_returned_gib"] == 1.0


@pytest.mark.parametrize("name", ["head/bf16_gpu_ignored_half", "logprobs/bf16_gpu_inference"])
def test_a_case_runs_through(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    entry = run_case(CASES[name], Options(CPU, rounds=2, quick=True))
    assert entry["status"] == "ok", entry["failure"]
    assert {"beyond_gradients_gib", "tflops", "tflops/gemm_floor"} <= set(entry["figures"])
    for run in ("varstream", "dense", "checkpointed_chunks"):
        assert entry["runs"][run]["peak_bytes"] > 0 and entry["runs"][run]["ratio"] != 0


# --- the reference --------------------------------------------------------------------------------


def head(**options):
    return ways.draw(SIZES, CPU, 1, **options)


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of the reference and chunks of the checkpointed way that don't divide the rows."""
    monkeypatch.setattr(reference, "BLOCK_ROWS", 128)
    monkeypatch.setattr(ways, "CHECKPOINTED_ROWS", 64)


def float64(h):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in (h.x, h.weight)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, {"ignored": 0.4}, {"frozen": True}])
def test_the_reference_of_a_loss(blocks, reduction, options):
    h = head(**options)
    x, weight = float64(h)
    leaves = [t for t in (x, weight) if t.requires_grad]
    loss = F.cross_entropy(x @ weight.t(), h.target, reduction=reduction)
    upstream = h.upstream[0].double() if reduction == "none" else None
    wanted = [loss, *torch.autograd.grad(loss, leaves, upstream)]
    found = reference.loss(h, reduction)
    assert len(found) == len(wanted) == (2 if "frozen" in options else 3)
    assert all(close(found, wanted, 1e-5))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_the_reference_of_log_probabilities(blocks, entropy, backward):
    h = head(backward=backward)
    x, weight = float64(h)
    p = (x @ weight.t()).softmax(1)
    values = [
        p.log().gather(1, h.target[:, None])[:, 0],
        torch.distributions.Categorical(p).entropy(),
    ]
    values = values[: 1 + entropy]
    wanted = list(values)
    if backward:
        wanted += torch.autograd.grad(
            values, [x, weight], [u.double() for u in h.upstream][: 1 + entropy]
        )
    assert all(close(reference.logprobs(h, entropy), wanted, 1e-5))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_reference_of_a_divergence(blocks, beta):
    pair = divergences.draw(PAIR_SIZES, CPU, 1)
    x, weight = float64(pair)
    p = (x @ weight.t()).softmax(1)
    q = (pair.teacher_x.double() @ pair.teacher_weight.double().t()).softmax(1)
    m = (1 - beta) * p + beta * q
    rows = (q * (q / m).log()).sum(1)
    if beta:
        rows = beta * rows + (1 - beta) * (p * (p / m).log()).sum(1)
    loss = rows.mean()
    wanted = [loss, *torch.autograd.grad(loss, [x, weight])]
    assert all(close(divergences.reference(pair, beta), wanted, 1e-5))


# --- what the check must see ----------------------------------------------------------------------


def test_the_check_tells_losses_apart(blocks):
    h = head(ignored=0.4)
    wanted = {reduction: reference.loss(h, reduction) for reduction in ("mean", "none")}
    for name in PLAIN:
        for reduction, results in wanted.items():
            assert all(close(ways.loss_and_gradients(ways.LOSSES[name], h, reduction), results))
    mean = wanted["mean"]
    by_all_rows = ways.loss_and_gradients(
        lambda x, w, t, r: F.cross_entropy(F.linear(x, w).float(), t, reduction="sum") / len(t),
        h,
        "mean",
    )
    assert not any(close(by_all_rows, mean))
    other = replace(h, target=h.target.where(h.target == ways.IGNORED, (h.target + 1) % 70))
    assert not any(close(ways.loss_and_gradients(ways.dense, other, "mean"), mean)[1:])
    upstream = (h.upstream[1], h.upstream[0])
    found = ways.loss_and_gradients(ways.dense, replace(h, upstream=upstream), "none")
    assert close(found, wanted["none"]) == [True, False, False]


def test_the_check_tells_the_directions_of_the_entropy_apart(blocks):
    h = head()
    wanted = reference.logprobs(h, True)
    for name in PLAIN:
        assert all(close(ways.logprobs_and_gradients(ways.LOGPROBS[name], h, True), wanted))
    swapped = replace(h, upstream=h.upstream[::-1])
    found = ways.logprobs_and_gradients(ways.row_values, swapped, True)
    assert close(found, wanted) == [True, True, False, False]


def test_the_check_tells_divergences_apart(blocks):
    pair = divergences.draw(PAIR_SIZES, CPU, 0)
    for beta in (0.0, 0.5):
        wanted = divergences.reference(pair, beta)
        for name in PLAIN:
            found = divergences.loss_and_gradients(divergences.WAYS[name], pair, beta)
            assert all(close(found, wanted))
        found = divergences.loss_and_gradients(divergences.dense, pair, beta + 0.1)
        assert not any(close(found, wanted))


def test_seeds_change_numbers():
    one, two = (ways.draw(SIZES, CPU, seed) for seed in (0, 1))
    again = ways.draw(SIZES, CPU, 0)
    assert torch.equal(one.x, again.x) and not torch.equal(one.x, two.x)
    assert 0.3 < head(ignored=0.4).valid.logical_not().float().mean() < 0.5
    assert head().valid.all() and head(frozen=True).leaves[0].shape == (300, 24)


# --- the row kernel -------------------------------------------------------------------------------

ROWS = {name: case for name, case in all_cases().items() if case.topic == "head_rows"}


def test_the_row_kernels_cases():
    assert len(ROWS) == 8
    for case in ROWS.values():
        (bar,) = case.bars
        assert bar.metric == "time/copy_floor" and bar.limit == pytest.approx(1 / 0.85)
        kind, shape = case.build.args[0], case.shape
        bytes_ = shape["rows"] * shape["classes"] * kind.logits.itemsize
        assert bytes_ <= 1.05 * 2**30, "a chunk"
        reason = case.needs("cuda")
        assert reason is None or reason == "built without a CUDA kernel of softmax_rows_"


@pytest.mark.parametrize(
    ("name", "bytes_of_a_logit"),
    [
        ("gradient_bf16_128256", 4),
        ("gradient_fp32_128256", 6),
        ("statistics_bf16_128256", 2),
        ("statistics_fp32_128256", 4),
    ],
)
def test_bytes_that_must_move(name, bytes_of_a_logit):
    kind = ROWS[f"head_rows/{name}"].build.args[0]
    chunk = head_rows.Chunk(kind, {"rows": 3, "classes": 8}, CPU, 0)
    assert chunk.moved == 3 * 8 * bytes_of_a_logit


@pytest.mark.emulated
@pytest.mark.parametrize("name", ROWS)
def test_the_emulated_row_kernel_passes_its_check_once(name, monkeypatch):
    """Gradients have replaced the logits by the second call, whose results are others."""
    monkeypatch.setattr(head_rows, "OPERATORS", emulation.load())
    case = ROWS[name]
    setup: Setup = case.build(case.sizes(quick=True), CPU, 0)
    checked = _check(case, setup, ["varstream"], {}, CPU, lambda phase: None)
    assert checked.errors["varstream"] < 5e-3
    gradient = case.build.args[0].gradient
    assert len(checked.ours) == 3 and checked.ours[2].dtype == (gradient or torch.float32)
    again = close(setup.runs["varstream"](), setup.runs["float32"]())
    assert again == ([True] * 3 if gradient is None else [False] * 3)


# --- ways that need a GPU or a package ------------------------------------------------------------


def test_a_function_is_compiled_once_a_case(monkeypatch):
    compiled = []

    def compile(function, dynamic):
        assert dynamic is False
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    ways._compiled.cache_clear()
    h, other = head(), ways.draw(SIZES | {"rows": 299}, CPU, 0)
    for _ in range(3):
        found = ways.loss_and_gradients(ways.LOSSES["dense_compiled"], h, "mean")
    assert len(compiled) == 1 and all(close(found, reference.loss(h, "mean")))
    found = ways.loss_and_gradients(ways.LOSSES["dense_compiled"], other, "mean")
    assert len(compiled) == 2 and all(close(found, reference.loss(other, "mean")))
    found = ways.logprobs_and_gradients(ways.LOGPROBS["dense_compiled"], other, True)
    assert len(compiled) == 3 and all(close(found, reference.logprobs(other, True)))
    pair = divergences.draw(PAIR_SIZES, CPU, 0)
    found = divergences.loss_and_gradients(divergences.dense_compiled, pair, 0.5)
    assert len(compiled) == 4 and all(close(found, divergences.reference(pair, 0.5)))
    ways._compiled.cache_clear()


@pytest.mark.parametrize("name", ["linear_cross_entropy", "token_logprobs"])
def test_ours_with_logits_in_bfloat16(name, monkeypatch):
    given = []
    exact = getattr(vs, name)

    def stand_in(*operands, logits_dtype=None, **options):
        given.append(logits_dtype)
        return exact(*operands, **options)

    monkeypatch.setattr(vs, name, stand_in)
    h = head()
    if name == "linear_cross_entropy":
        found = ways.loss_and_gradients(ways.LOSSES["bf16_logits"], h, "none")
        assert all(close(found, reference.loss(h, "none")))
    else:
        found = ways.logprobs_and_gradients(ways.LOGPROBS["bf16_logits"], h, True)
        assert all(close(found, reference.logprobs(h, True)))
    assert given == [torch.bfloat16]
    reason = grid.logprob_peers(True)[0].needs("cuda"), grid.loss_peers()[0].needs("cuda")
    assert all(r is None or "takes no logits_dtype" in r for r in reason)


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins with the packages' signatures; ``options`` is what each was given."""
    options = {}

    def liger(
        input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
        label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
    ):  # fmt: skip
        options["liger"] = accum_dtype
        return ways.dense(input, weight, target, reduction)

    def cut(e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean", impl=None):
        options["cut"] = impl
        return ways.dense(e, c, targets, reduction)

    def quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True):
        options["quack"] = tuned
        return ways.dense(x, weight, target, reduction)

    def divergence(
        student_input, student_weight, teacher_input, teacher_weight, shift_labels=None,
        jsd_beta=0.5, ignore_index=-100, temperature=1.0,
    ):  # fmt: skip
        operands = student_input, student_weight, teacher_input, teacher_weight
        return divergences.row_divergences(*operands, jsd_beta).mean()

    functional = {"liger_fused_linear_cross_entropy": liger, "liger_fused_linear_jsd": divergence}
    for name, functions in {
        "liger_kernel.transformers.functional": functional,
        "cut_cross_entropy": {"linear_cross_entropy": cut},
        "quack.linear_cross_entropy": {"chunked_linear_cross_entropy": quack},
    }.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
        vars(sys.modules[name]).update(functions)
    return options


@pytest.mark.parametrize(
    ("name", "key", "option"),
    [
        ("liger", "liger", torch.float32),
        ("cut_cross_entropy", "cut", "cce_exact"),
        ("cut_cross_entropy_default", "cut", "cce"),
        ("quack", "quack", True),
    ],
)
def test_packages_are_called_as_they_ask(packages, name, key, option):
    h = head(ignored=0.2)
    found = ways.loss_and_gradients(ways.LOSSES[name], h, "mean")
    assert packages == {key: option}
    assert all(close(found, reference.loss(h, "mean")))
    if name != "quack":
        h = head()
        found = ways.logprobs_and_gradients(ways.LOGPROBS[name], h, False)
        assert all(close(found, reference.logprobs(h, False)))


def test_ligers_divergence_is_called_as_it_asks(packages):
    pair = divergences.draw(PAIR_SIZES, CPU, 0)
    found = divergences.loss_and_gradients(divergences.liger, pair, 0.5)
    assert all(close(found, divergences.reference(pair, 0.5)))


def test_a_keyword_that_is_not_there_leaves_its_run_out():
    def old(x, chunk_size=None): ...

    assert peers.takes(old, "chunk_size")("cuda") is None
    assert peers.takes(old, "logits_dtype")("cuda") == "old takes no logits_dtype"
