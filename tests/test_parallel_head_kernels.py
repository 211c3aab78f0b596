"""The vocabulary-parallel head through the row kernels, emulated, in gloo groups of 2 and 4."""

from __future__ import annotations

import contextlib
from typing import Any

import emulation
import pytest
import torch
import torch.multiprocessing as mp
from head_cases import FEATURES, dense
from parallel_cases import (
    ALL,
    CASES,
    LOW,
    SIZES,
    WHOLE,
    Place,
    Results,
    assembled,
    collectives,
    loss,
    low_precision,
    nan_row,
    plain,
    run,
    shard_of,
    work,
)
from torch.utils._python_dispatch import TorchDispatchMode

from varstream.cross_entropy.chunk_rule import chunk_rows
from varstream.ops._head import AUTO_CHUNK, HeadCall
from varstream.parallel import _kernels
from varstream.parallel._checks import _planned
from varstream.parallel._shards import Shards
from varstream.testing import assert_error_ratio, assert_exact

TOLERANCE = 1e-5  # of values in float32 and of float32 gradients; sums of both signs cancel
# Float32 rounds logits of 1000 to 6e-5.
OFFSET_TOLERANCE = 3e-4
# How the case of low precision is run besides: logits stored in bfloat16, as a plain head does.
NARROW = {"logits_dtype": torch.bfloat16}

# An option alone is the same to "sum" as to "mean".
KERNEL_CASES = [n for n in CASES if n.removeprefix("sum-") not in FEATURES]


# --- what a rank does -----------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts how often the host looks at a tensor's values."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.count += name in ("aten::_local_scalar_dense", "aten::nonzero")
        return func(*args, **(kwargs or {}))


def host_reads(place: Place) -> Results:
    """Forward and backward of rows that may be left out, with a bound on their number."""
    found = {}
    told = place.calls(shard_sizes=place.sizes)
    for reduction in ("mean", "none"):
        p = shard_of(plain(torch.float32), place.own)
        with Reads() as forward:
            names = ("token_weight", "smoothing")
            value = loss(p, told, names, reduction=reduction, chunk_size=4, max_rows=16)[0]
        with Reads() as backward:
            value.sum().backward()
        found[reduction] = (forward.count, backward.count)
    return found


def too_many_rows(place: Place) -> Results:
    """A bound that fewer rows keep than take part, and one that just holds them."""
    p = shard_of(plain(torch.float32), place.own)
    call, logprobs, where = place.calls()
    operands = p.input, p.weight, p.target
    found = {}
    for bound in (11, 12):
        options = {"linear_bias": p.bias, "max_rows": bound, "chunk_size": 5, **where}
        found[bound] = [f(*operands, **options).detach() for f in (call, logprobs)]
    return found


def summed_dtypes(place: Place, kept: Any = Shards.start_sum) -> Results:
    """What the sums of a bfloat16 input's gradient over the ranks are in, a chunk each."""
    p = shard_of(plain(torch.bfloat16), place.own)
    seen = []

    def start_sum(shards: Shards, values: torch.Tensor) -> Any:
        seen.append(values.dtype)
        return kept(shards, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "start_sum", start_sum)
        loss(p, place.calls(), chunk_size=4)
    return {"dtypes": seen}


def no_targets(place: Place) -> Results:
    """Targets (N, 0)."""
    p = shard_of(plain(torch.float32), place.own)
    p.target = p.target[:, None][:, :0]
    value = loss(p, place.calls())[0]
    value.backward()
    return {"loss": value.detach(), "grads": [p.input.grad, p.weight.grad]}


def kernel_results(place: Place) -> Results:
    """Every case in float32 and every probe, as one rank of a group sees them."""
    with emulation.emulated():
        calls = [place.calls(), place.calls(shard_sizes=place.sizes)]
        found: Results = {}
        for i, name in enumerate(KERNEL_CASES):
            found[name] = run(name, calls[i % 2], place.own, torch.float32)
        for name in LOW:
            low = name, calls[0], place.own, torch.bfloat16
            found[f"low-{name}"] = low_precision(*low)
            found[f"narrow-{name}"] = low_precision(*low, **NARROW)
        for probe in (host_reads, too_many_rows, summed_dtypes, no_targets):
            found[probe.__name__] = probe(place)
        torch.manual_seed(6)
        found["nan_row"] = nan_row(place, torch.float32)
        found["collectives"] = collectives(place, torch.float32)
    return found


# --- what the ranks found -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ranks left what they found."""
    emulation.load()
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder), kernel_results), nprocs=4)
    return folder


@pytest.fixture(scope="module", params=SIZES)
def ranks(request, folder) -> list[Results]:
    """What each rank of a group found."""
    paths = [folder / f"{request.param}-{rank}.pt" for rank in range(request.param)]
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_results_and_gradients_of_one_process(ranks, name):
    """Against the whole head in float64, but autocast, which is in bfloat16 for both."""
    autocast = name == "autocast"
    exact = run(name, WHOLE, ALL, torch.float32 if autocast else torch.float64)
    got = assembled(ranks, name)
    tolerance = OFFSET_TOLERANCE if "offset" in name else 1e-2 if autocast else TOLERANCE
    for part in ("outputs", "grads"):
        for i, (ours, theirs) in enumerate(zip(got[part], exact[part], strict=True)):
            assert (ours is None) == (theirs is None), f"{part} {i}"
            if ours is not None:
                assert ours.dtype in (torch.float32, torch.int64, torch.bool)
                assert_exact(ours, theirs, tolerance, f"{part} {i}")


@pytest.mark.parametrize("kind", ["low", "narrow"])
@pytest.mark.parametrize("name", LOW)
def test_low_precision(ranks, name, kind):
    """By the error-ratio rule; what W's rows have in common costs as much as on one process."""
    got = assembled(ranks, f"{kind}-{name}")
    exact = low_precision(name, WHOLE, ALL, torch.float64)
    with emulation.emulated() if name == "common" else contextlib.nullcontext():
        narrow = NARROW if kind == "narrow" else {}
        common = low_precision(name, WHOLE, ALL, torch.bfloat16, **narrow)
    ratio = 3.0 if "softcap" in name else 2.0
    # Narrow logits cost what their rounding does: eps / 2 of a logit.
    tolerance = TOLERANCE if kind == "low" else 3e-3
    assert_exact(got["outputs"][0], exact["outputs"][0], tolerance)
    for ours, plainly, exactly in zip(got["grads"], common["grads"], exact["grads"], strict=True):
        assert ours.dtype == torch.bfloat16
        assert_error_ratio(ours, plainly, exactly, ratio)


def test_nan_rows_stay_in_their_row(ranks):
    torch.manual_seed(6)
    p = plain()
    expected = dense(p, "none")
    (want,) = torch.autograd.grad(expected, p.input, p.valid.double())
    for rank in ranks:
        value, grad = rank["nan_row"]["loss"], rank["nan_row"]["input"]
        assert value[[3, 8]].isnan().all() and grad[3].isnan().all()
        rest = [i for i in range(16) if i not in (3, 8)]
        assert value[5] == 0 and not grad[[5, 8]].any()
        assert_exact(value[rest], expected[rest], TOLERANCE)
        assert_exact(grad[rest], want[rest], TOLERANCE)
        weighted, shard_grad = rank["nan_row"]["weighted"]
        assert_exact(weighted.detach(), 1.5 * expected[rest].sum(), TOLERANCE)
        assert shard_grad.isfinite().all() and shard_grad.any()


def test_collectives(ranks):
    """As without the kernels: one gather and one sum a chunk."""
    for rank in ranks:
        assert rank["collectives"] == {
            "mean": ([4, 3], [0, 0]),
            "sum": ([3, 3], [0, 0]),
            "none": ([3, 0], [3, 3 + 1]),
        }


def test_the_host_reads_the_targets_only(ranks):
    for rank in ranks:
        assert rank["host_reads"] == {"mean": (1, 0), "none": (1, 0)}


def test_more_rows_than_max_rows(ranks):
    for rank in ranks:
        (total, logp), (whole, every) = rank["too_many_rows"].values()
        ignored = [0, 5, 6, 15]
        assert total.isnan() and not logp[ignored].any()
        assert logp.isnan().sum() == 12
        assert whole.isfinite() and every.isfinite().all()


def test_input_gradients_are_summed_before_they_are_rounded(ranks):
    for rank in ranks:
        assert rank["summed_dtypes"] == {"dtypes": [torch.float32] * 3}


def test_no_targets(ranks):
    for rank in ranks:
        assert rank["no_targets"]["loss"] == 0
        assert not any(grad.any() for grad in rank["no_targets"]["grads"])


def test_chunk_rule_of_the_largest_shard(monkeypatch):
    """Every rank finds the same rows, those of the kernels' rule."""
    monkeypatch.setattr(_kernels, "serve", lambda device: True)
    rows, width, sizes = 100_000, 4096, (1000, 200_000)
    x = torch.empty((), dtype=torch.bfloat16)
    target = torch.zeros(()).long().expand(rows)

    def chosen(rank: int, x: torch.Tensor, **options: object) -> int:
        weight = x.expand(sizes[rank], width)
        scalars = -100, 1.0, 0.0, 1.0, AUTO_CHUNK
        call = HeadCall(x.expand(rows, width), weight, None, target, *scalars, **options)
        return _planned(call, Shards(None, rank, sizes)).call.chunk_size

    for rank in (0, 1):
        assert chosen(rank, x) == chunk_rows(rows, width, 200_000)
        few = chosen(rank, x, max_rows=500, logits_dtype=torch.bfloat16)
        assert few == chunk_rows(500, width, 200_000, 2) < chosen(rank, x)
        assert chosen(rank, x.double()) < chosen(rank, x)  # composed: the CPU's rule


def test_float64_and_unserved_devices_stay_composed(monkeypatch):
    assert not _kernels.chosen(torch.ones(1))
    monkeypatch.setattr(_kernels, "serve", lambda device: True)
    assert _kernels.chosen(torch.ones(1)) and not _kernels.chosen(torch.ones(1).double())
