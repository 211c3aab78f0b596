"""The autograd function under streaming: a layer over packed rows that saves its input and nothing
else, and whose backward recomputes one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varstream._random_state import RandomState, random_state_kept
from varstream.streaming.attend import Attend, AttendBackward, AttendProject, Keys, Projected
from varstream.streaming.gradients import GradientSums
from varstream.streaming.modes import Modes
from varstream.streaming.schedule import DeviceChunk, Schedule

Rebuild = Callable[[slice], Tensor]
# body(x (c, d), its chunk, attend) -> outputs (c, ...), y first. It acts row by row but for attend.
# A module that it runs is its attribute ``layer``.
Body = Callable[[Tensor, DeviceChunk, Attend], tuple[Tensor, ...]]


@dataclass
class Flow:
    """The gradient that goes down a stack of streamed layers.

    A layer whose output goes into the next one and nowhere else may write its own dx over the dx of
    that one, which is its dy: rows of a chunk are read before they are written.
    """

    address: int = 0  # of the dx that the layer above has given away, 0 for none


@dataclass(frozen=True)
class Work:
    """What forward and backward of one streamed layer share."""

    body: Body
    schedule: Schedule
    attends: bool  # False: the body acts row by row
    flow: Flow | None
    gives: bool  # its dx to the layer below
    rebuild: Rebuild | None  # rows of x again, which isn't kept then


def run_streamed(
    body: Body,
    x: Tensor,
    schedule: Schedule,
    params: Sequence[Tensor],
    attends: bool = True,
    flow: Flow | None = None,
    gives: bool = False,
    rebuild: Rebuild | None = None,
) -> tuple[Tensor, ...]:
    """The body's outputs over all rows x (n, d), differentiable in x and params, once.

    Within a stack ``flow`` is the stack's; ``gives`` says that x is the output of the layer below
    and nobody else's. With ``rebuild``, which gives rows of x again, x isn't kept for the backward.
    """
    return _Streamed.apply(Work(body, schedule, attends, flow, gives, rebuild), x, *params)


class _Streamed(torch.autograd.Function):
    """Parameters are inputs, so their gradients leave once however many chunks there were and hooks
    of DDP or FSDP fire once."""

    @staticmethod
    def forward(ctx: Any, work: Work, x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.work, ctx.params = work, params
        ctx.autocast = _autocast_state(x.device.type)
        ctx.modes = Modes(getattr(work.body, "layer", None))
        kept = [x] if work.rebuild is None else []
        ctx.save_for_backward(*kept, *params)  # params: so that autograd notices changes in place
        ctx.like = x.detach().new_empty(0, *x.shape[1:])
        ctx.states = []
        keys, outputs = Keys(x.shape[0]), None
        for chunk in work.schedule.chunks:
            ctx.states.append(RandomState([x.device]))
            parts = work.body(x[chunk.rows], chunk, Attend(keys, chunk))
            if outputs is None:
                outputs = tuple(part.new_empty(x.shape[0], *part.shape[1:]) for part in parts)
            for whole, part in zip(outputs, parts, strict=True):
                whole[chunk.rows] = part
        assert outputs is not None
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only create_graph=True runs a backward with gradients on
            raise RuntimeError(
                "a streamed layer has no second derivative: create_graph=True is refused"
            )
        work, params, saved = ctx.work, ctx.params, ctx.saved_tensors
        rows_of = saved[0].__getitem__ if work.rebuild is None else work.rebuild
        like, shape = ctx.like, (work.schedule.total, *ctx.like.shape[1:])
        wanted = [p for p, need in zip(params, ctx.needs_input_grad[2:], strict=True) if need]
        sums = GradientSums(wanted)
        dx = _room(work.flow, like, shape, grads[0]) if ctx.needs_input_grad[1] else None
        chunks = list(zip(work.schedule.chunks, ctx.states, strict=True))
        keys = Keys(shape[0])
        with ExitStack() as stack:
            stack.enter_context(ctx.autocast())
            stack.enter_context(ctx.modes.restored())
            stack.enter_context(random_state_kept([like.device]))
            if work.attends:
                _project(work, rows_of, chunks, keys)
            stack.enter_context(sums.taken())
            for chunk, state in reversed(chunks):
                state.restore()
                _backward_chunk(work, keys, chunk, rows_of, grads, dx, sums)
        if work.flow is not None:
            work.flow.address = dx.data_ptr() if dx is not None and work.gives else 0
        found = iter(sums.finish())
        param_grads = [next(found) if need else None for need in ctx.needs_input_grad[2:]]
        return None, dx, *param_grads


def _room(flow: Flow | None, like: Tensor, shape: tuple[int, ...], dy: Tensor | None) -> Tensor:
    """Where dx goes: over dy where the layer above gave it, else into memory of its own."""
    if flow is None or dy is None:
        return like.new_empty(shape)
    given, flow.address = flow.address, 0  # memory of a backward that failed may be another's now
    ours = dy.data_ptr() == given and not dy.is_meta and dy.is_contiguous()
    same = (tuple(dy.shape), dy.dtype) == (shape, like.dtype)
    return dy if ours and same else like.new_empty(shape)


@torch.no_grad()
def _project(
    work: Work, rows_of: Rebuild, chunks: list[tuple[DeviceChunk, RandomState]], keys: Keys
) -> None:
    """K and V of all rows, formed chunk by chunk without a graph: the body runs up to there."""
    for chunk, state in chunks:
        state.restore()
        with suppress(Projected):
            work.body(rows_of(chunk.rows), chunk, AttendProject(keys, chunk))
    torch.clear_autocast_cache()  # casts of the weights, without a graph
    keys.start_gradients()


def _backward_chunk(
    work: Work,
    keys: Keys,
    chunk: DeviceChunk,
    rows_of: Rebuild,
    grads: Sequence[Tensor | None],
    dx: Tensor | None,
    sums: GradientSums,
) -> None:
    """Recompute one chunk with a graph and run it back: dx rows, parameter sums, dK and dV of its
    keys, and with its own, complete by then, the way back through the projections."""
    rows = chunk.rows
    attend = AttendBackward(keys, chunk)
    with torch.no_grad():
        part = rows_of(rows)
    with torch.enable_grad():
        part = part.detach().requires_grad_(dx is not None)
        outputs = work.body(part, chunk, attend)
    pairs = [(o, g[rows]) for o, g in zip(outputs, grads, strict=True) if g is not None]
    if attend.anchor is not None:  # also where nothing of this chunk attended
        pairs.append((attend.anchor, torch.zeros_like(attend.anchor)))
    sums.backward(pairs, part, None if dx is None else dx[rows])


def _autocast_state(device_type: str) -> Callable[[], Any]:
    """A factory of contexts that restore the autocast state of now, for the recomputation."""
    if device_type == "meta":  # unknown to autocast
        return nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
