"""The head's rows on a device: chosen there, walked in chunks, and nothing read on the host."""

from contextlib import contextmanager

import pytest
import torch
from emulation import DRIVERS, emulated
from head_cases import (
    EVERYTHING,
    IGNORE,
    REDUCTIONS,
    loss_of,
    options_of,
    problem,
    several_targets,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import varstream as vs
from varstream.cross_entropy import rows as device_rows
from varstream.cross_entropy.rows import select_rows
from varstream.ops import _linear_cross_entropy, _token_logprobs

each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

# --- the rows themselves --------------------------------------------------------------------------

MASKS = st.lists(st.booleans(), max_size=70) | st.integers(0, 300).flatmap(
    lambda n: st.sampled_from([[True] * n, [False] * n, [True] + [False] * n])
)
BOUNDS = st.none() | st.integers(0, 80)
SIZES = st.integers(1, 90)


def make(mask, bound):
    rows = select_rows(torch.tensor(mask, dtype=torch.bool), bound)
    return rows, [i for i, on in enumerate(mask) if on]


@settings(deadline=None, max_examples=200)
@given(MASKS, BOUNDS)
def test_order(mask, bound):
    """Rows that take part first, in their order, each row once; the others are inert."""
    rows, live = make(mask, bound)
    assert rows.total == len(mask) and int(rows.count) == len(live)
    assert rows.bound == (len(mask) if bound is None else min(bound, len(mask)))
    order, index = rows.order.tolist(), rows.index.tolist()
    others = [i for i, on in enumerate(mask) if not on]
    assert order == (live + others)[: rows.bound]
    kept = live[: rows.bound]
    assert index == kept + [-1] * (rows.bound - len(kept))


@settings(deadline=None, max_examples=200)
@given(MASKS, BOUNDS, st.sampled_from([(), (3,)]))
def test_gather_and_scatter_undo_each_other(mask, bound, shape):
    rows, live = make(mask, bound)
    values = torch.randn(len(mask), *shape)
    compact = rows.gather(values)
    assert compact.is_contiguous() and torch.equal(compact, values[rows.order])
    spread = rows.scatter(compact, 7.0)
    assert spread.shape == values.shape
    if bound is not None and len(live) > bound:
        assert spread.isnan().all()
        return
    assert torch.equal(rows.gather(spread), compact)
    placed = torch.zeros(len(mask), dtype=torch.bool).index_fill_(0, rows.order, True)
    assert torch.equal(spread[placed], values[placed]) and (spread[~placed] == 7.0).all()
    assert placed[live].all()
    whole = rows.scatter(torch.arange(rows.bound), -1)
    assert whole.dtype == torch.int64 and (whole[~placed] == -1).all()


def check_chunks(parts, rows, size, least):
    """Pieces one after the other from row 0, at most ``size`` rows, up to ``least`` or beyond."""
    edges = [0, *(part.stop for part in parts)]
    assert [part.start for part in parts] == edges[:-1]
    assert all(0 < part.stop - part.start <= size for part in parts)
    assert edges[-1] <= rows.bound and edges[-1] >= least


@settings(deadline=None, max_examples=300)
@given(MASKS, BOUNDS, SIZES)
def test_chunks(mask, bound, size):
    """With the caller's bound all of it; else to the last row that takes part, and not a chunk
    further."""
    rows, live = make(mask, bound)
    parts = list(rows.chunks(size))
    check_chunks(parts, rows, size, rows.bound if bound is not None else len(live))
    if bound is None:
        assert all(part.start < max(1, len(live)) for part in parts)
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths, default=0) <= rows.largest_chunk(size) <= size
    assert not lengths or max(lengths) - min(lengths) <= 1
    if bound is not None:
        assert max(lengths, default=0) == rows.largest_chunk(size)


@settings(deadline=None, max_examples=100)
@given(MASKS, SIZES)
def test_chunks_where_nobody_may_wait(mask, size):
    """While a graph is captured the count stays unknown: all of the rows are walked."""
    rows, _ = make(mask, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_rows._HostCount, "known", lambda self: float("inf"))
        parts = list(rows.chunks(size))
    check_chunks(parts, rows, size, rows.bound)


def test_the_count_is_looked_at_after_the_first_chunk(monkeypatch):
    rows, _ = make([True] * 10 + [False] * 10, None)
    looks = []
    monkeypatch.setattr(device_rows._HostCount, "known", lambda self: looks.append(1) or 10)
    walk = rows.chunks(5)
    assert next(walk) == slice(0, 5) and not looks
    assert list(walk) == [slice(5, 10)] and len(looks) == 2
    looks.clear()
    assert list(rows.chunks(20)) == [slice(0, 20)] and not looks  # one chunk: nothing to know


@settings(deadline=None, max_examples=100)
@given(MASKS, BOUNDS)
def test_poison(mask, bound):
    rows, live = make(mask, bound)
    broken = bound is not None and len(live) > bound
    found = rows.poison(torch.ones(3))
    assert found.isnan().all() if broken else torch.equal(found, torch.ones(3))


# --- nothing is read on the host ------------------------------------------------------------------

READS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::unique_consecutive",
}


class NoReads(TorchDispatchMode):
    """An operator whose shape or result waits for a device's values is an error, inside the
    drivers too."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        name = name.partition(".")[0]
        self.seen.add(name)
        if namespace == "varstream" and name in DRIVERS:
            with self:
                return DRIVERS[name](*args)
        read = f"{namespace}::{name}" in READS
        if name in ("index", "index_put", "index_put_") and args[1] is not None:
            read = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        assert not read, f"{namespace}::{name} reads values on the host"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads():
    """Operators of the emulated kernels under ``NoReads``."""
    with emulated(), NoReads() as mode:
        yield mode
    assert {"softmax_rows_", "pack"} <= mode.seen


def step(p, reduction, several_options, **chunking):
    loss = loss_of(p, reduction, **several_options, **chunking)
    loss.sum().backward()
    stats = vs.token_logprobs(
        p.input, p.weight, p.target, linear_bias=p.bias, return_stats=True, **chunking
    )
    sum((v * (i + 1)).sum() for i, v in enumerate(stats[:3])).backward()


@pytest.mark.emulated
def test_reads_are_noticed():
    p = problem()  # float64 goes to composed kernels, which look for the rows
    with pytest.raises(AssertionError, match="reads values on the host"), no_reads():
        loss_of(p)


@pytest.mark.emulated
@each_reduction
@pytest.mark.parametrize("names", [(), EVERYTHING], ids=["plain", "all"])
@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
@pytest.mark.parametrize("into_buffer", [False, True], ids=["autograd", "weight_grad"])
def test_with_a_bound_nothing_is_read(reduction, names, several, into_buffer):
    p = problem(ignored=[3], dtype=torch.float32)
    p = several_targets(p) if several else p
    options = options_of(p, names) | {"return_metrics": False}
    chunking = {"chunk_size": 5, "max_rows": 16}
    if into_buffer:
        chunking["weight_grad"] = torch.zeros(23, 9)
    with no_reads():
        step(p, reduction, options, **chunking)


@pytest.mark.emulated
@each_reduction
def test_without_a_bound_the_count_alone_is_read(monkeypatch, reduction):
    """After a chunk is on its way, once for each further one."""
    p = problem(ignored=[3], dtype=torch.float32)
    reads, known = [], device_rows._HostCount.known

    def counted(self):
        reads.append(self)
        with _disable_current_modes():
            return known(self)

    monkeypatch.setattr(device_rows._HostCount, "known", counted)
    with no_reads():
        step(p, reduction, options_of(p, EVERYTHING), chunk_size=5)
    walks = 3 if reduction != "none" else 4  # forwards, and the backwards that walk again
    assert len(set(reads)) == walks
    reads.clear()
    with no_reads():
        step(p, reduction, {}, chunk_size=16)  # one chunk
    assert not reads


@pytest.fixture
def meta_kernels():
    """Row kernels that do nothing on the meta device, where there are no values to read."""
    library = torch.library.Library("varstream", "IMPL")
    library.impl("softmax_rows_", lambda *_: None, "Meta")
    yield
    library._destroy()


def on_meta(p):
    x, weight, bias = (t.detach().to("meta") for t in p.leaves)
    head = (x, weight, bias, p.target.to("meta"), IGNORE, 1.0, 0.0, 1.0, 5)
    return head, weight


def test_drivers_on_meta_tensors(meta_kernels):
    p = problem(dtype=torch.bfloat16)
    head, weight = on_meta(p)
    scales = (None, None, None, None)
    loss = _linear_cross_entropy.driver(*head, 16, None, *scales, True, True, True, True)
    assert loss.loss_sum.is_meta and loss.weight.shape == weight.shape
    values = _token_logprobs.driver(*head, 16, None, None, True, True, True, True)
    assert values.logp.shape == (16,)
    dlogp = torch.empty(16, device="meta")
    backward = (dlogp, dlogp, dlogp, dlogp, dlogp, *head, 16, None, None)
    dx, dw, _ = _token_logprobs.bwd_driver(*backward, True, True, True)
    assert dx.shape == head[0].shape and dw.shape == weight.shape
    buffer = torch.empty(weight.shape, device="meta")
    _token_logprobs.accumulate_driver(*backward, True, True, buffer)
    with pytest.raises(RuntimeError, match="meta"):  # the count of rows would be looked at
        _linear_cross_entropy.driver(*head, None, None, *scales, True, True, True, True)


@each_reduction
@pytest.mark.parametrize("max_rows", [None, 9])
def test_public_calls_on_meta_tensors(reduction, max_rows):
    p = problem(dtype=torch.bfloat16)
    for name in ("input", "weight", "bias", "target"):
        t = getattr(p, name).detach().to("meta")
        setattr(p, name, t.requires_grad_(t.is_floating_point()))
    buffer = torch.empty(23, 9, device="meta")
    options = options_of(problem(), ("smoothing", "z_loss", "softcap")) | {"max_rows": max_rows}
    loss = loss_of(p, reduction, weight_grad=buffer, return_metrics=False, **options)
    loss.sum().backward()
    assert p.input.grad.shape == (16, 9) and p.weight.grad is None
    loss_of(p, reduction, **options).sum().backward()
    assert p.weight.grad.shape == (23, 9)
