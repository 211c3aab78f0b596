"""The vocabulary-parallel head in gloo groups of 1, 2 and 4 processes, against the whole head."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from head_cases import dense
from parallel_cases import (
    ALL,
    CASES,
    LOW,
    SIZES,
    TOLERANCE,
    WHOLE,
    Results,
    assembled,
    low_precision,
    plain,
    run,
    work,
)

from varstream import parallel
from varstream.testing import assert_error_ratio, assert_exact, peak_memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ranks left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=4)
    return folder


@pytest.fixture(scope="module", params=SIZES)
def ranks(request, folder) -> list[Results]:
    """What each rank of a group found."""
    paths = [folder / f"{request.param}-{rank}.pt" for rank in range(request.param)]
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.fixture
def alone(monkeypatch):
    """A group of this process only."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_of_one_process(ranks, name):
    got, want = assembled(ranks, name), run(name, WHOLE, ALL)
    tolerance = next((t for key, t in TOLERANCE.items() if key in name), 1e-12)
    for part in ("outputs", "grads"):
        for i, (ours, theirs) in enumerate(zip(got[part], want[part], strict=True)):
            assert (ours is None) == (theirs is None), f"{part} {i}"
            if theirs is not None:
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                assert_exact(ours, theirs, tolerance, f"{part} {i}")


@pytest.mark.parametrize("name", LOW)
def test_low_precision(ranks, name):
    got = assembled(ranks, f"low-{name}")
    common, exact = (
        low_precision(name, WHOLE, ALL, dtype) for dtype in (torch.bfloat16, torch.float64)
    )
    ratio = 3.0 if "softcap" in name else 2.0
    assert_error_ratio(got["outputs"][0], common["outputs"][0], exact["outputs"][0])
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
        assert_exact(value[rest], expected[rest])
        assert_exact(grad[rest], want[rest])
        weighted, shard_grad = rank["nan_row"]["weighted"]
        assert_exact(weighted.detach(), 1.5 * expected[rest].sum())
        assert shard_grad.isfinite().all() and shard_grad.any()


def test_without_gradients_nothing_is_summed(ranks):
    torch.manual_seed(6)
    p = plain()
    for rank in ranks:
        value, logprobs = rank["no_grad"]["values"]
        assert_exact(value, dense(p))
        assert_exact(logprobs, p.dense_logprobs()[0])
        assert rank["no_grad"]["seen"] == {"all_gather": 2 * (3 + 1), "all_reduce": 0}


def test_collectives(ranks):
    """One gather and one sum a chunk; the sizes are one more, which shard_sizes saves."""
    for rank in ranks:
        assert rank["collectives"] == {
            "mean": ([4, 3], [0, 0]),
            "sum": ([3, 3], [0, 0]),
            "none": ([3, 0], [3, 3 + 1]),  # the rows that take part are agreed on
        }


@pytest.mark.parametrize(("reduction", "softcap"), [("mean", 0.0), ("mean", 3.0), ("none", 0.0)])
def test_memory(alone, reduction, softcap):
    """The gradients, two chunks at most and what is per row: no logits of all 2048 rows."""
    x = torch.randn(2048, 8, requires_grad=True)
    weight = torch.randn(999, 8, requires_grad=True)
    target = torch.randint(999, (2048,))
    options = {"reduction": reduction, "softcap": softcap, "label_smoothing": 0.1}

    def call():
        value = parallel.linear_cross_entropy(x, weight, target, chunk_size=16, **options)
        return torch.autograd.grad(value.sum(), (x, weight))

    chunk, rows, gradients = 16 * 1000 * 4, 2048 * 8 * 16, 2 * (2048 + 999) * 8 * 4
    assert chunk < peak_memory(call) < 4 * chunk + rows + gradients < 2048 * 999 * 4 / 8


ELSEWHERE = "ValueError: the arguments must be valid on every rank of group, got an error on ranks"
EVERY = "on every rank of group"
ERRORS = {
    "bias": "ValueError: linear_bias must have size {own} in dimension 0 (V_r,), got shape ({less}",
    "kind": "TypeError: linear_weight_shard must be a torch.Tensor, got list",
    "rows": f"ValueError: input must have the same number of rows N {EVERY}, got [16,",
    "width": f"ValueError: input must have the same width d {EVERY}, got [9, ",
    "dtype": f"ValueError: input must have the same dtype {EVERY}, got others on ranks [{{last}}]",
    "target": f"ValueError: target must be the same {EVERY}, got others on ranks [{{last}}]",
    "grad": f"ValueError: input must require a gradient {EVERY} or on none, got others",
    "options": f"ValueError: the options must be the same {EVERY}, got others on ranks [{{last}}]",
    "token_weight": f"ValueError: the options must be the same {EVERY}",
    "range": "ValueError: target must hold classes in [0, 23) or ignore_index=-100, got 23 at row",
    "classes": "ValueError: weight must have size 23 in dimension 0 (V,), got shape (22,)",
    "empty": "ValueError: linear_weight_shard must have at least one class (V_r, d), got 0",
    "sizes_kind": "TypeError: shard_sizes must be a list or tuple of ints, got int",
    "sizes_count": "ValueError: shard_sizes must have one entry a rank ({world}), got {more}",
    "sizes_own": "ValueError: shard_sizes[{rank}] must be the number of rows of this rank's",
    "max_rows": "ValueError: max_rows must bound the rows that take part, 12 of them, got 11",
    "logits_dtype": "ValueError: logits_dtype must be None or torch.float32 here: only the CUDA",
    "group": "TypeError: group must be a torch.distributed.ProcessGroup or None (the default",
    "outside": "ValueError: group must contain this process, got a group of other ranks",
    "twice": "RuntimeError: parallel.linear_cross_entropy has no second derivative",
    "twice_rows": "RuntimeError: parallel.token_logprobs has no second derivative",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_reach_every_rank(ranks, name):
    world = len(ranks)
    for rank, found in enumerate(ranks):
        own = SIZES[world][rank]
        values = {"own": own, "less": own - 1, "last": world - 1, "rank": rank}
        expected = ERRORS[name].format(world=world, more=world + 1, **values)
        if name in ("bias", "kind") and rank != world - 1:
            expected = f"{ELSEWHERE} [{world - 1}]"
        assert found["errors"][name].startswith(expected)


def test_torch_distributed_must_be_initialised():
    p = plain()
    for call in (parallel.linear_cross_entropy, parallel.token_logprobs):
        with pytest.raises(ValueError, match="^group must be .*initialised first .*got None with"):
            call(p.input, p.weight, p.target)
