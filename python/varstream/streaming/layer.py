"""``stream_layer``: one decoder layer whose backward runs chunk by chunk over packed rows.

K and V are formed once for the whole layer; chunks of queries then run against them, and their backward adds dK and dV
into float32 (float64) buffers with Hkv heads. Besides those buffers and the layer's input only one chunk's activations
ever exist. After StreamBP (Luo et al., 2025), with K/V kept instead of re-projected per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varstream._checks import acc_dtype, check_cu_seqlens, check_tensor
from varstream.ops.attention import varlen_attention
from varstream.ops.attention_backward import varlen_attention_backward
from varstream.streaming.chunks import Chunk, plan_chunks

Attend = Callable[[Tensor], Tensor]
KV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Rest = Callable[[Tensor, Tensor, Attend], Tensor]

CPU_CHUNK, CUDA_CHUNK = 1024, 4096


def resolve_chunk_size(chunk_size: int | str, device: torch.device) -> int:
    """Rows of a layer chunk; ``"auto"`` is 1024 on the CPU, 4096 on CUDA, enough rows for full-speed GEMMs."""
    if chunk_size == "auto":
        return CUDA_CHUNK if device.type == "cuda" else CPU_CHUNK
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f'chunk_size must be an int or "auto", got {chunk_size!r}')
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    return chunk_size


@dataclass(frozen=True)
class DeviceChunk:
    """A chunk whose cumulative lengths are on the device."""

    plan: Chunk
    cu_q: Tensor
    cu_k: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.plan.begin, self.plan.end)

    @property
    def keys(self) -> slice:
        return slice(self.plan.key_begin, self.plan.end)

    def lengths(self) -> dict[str, Any]:
        """The length arguments of the attention ops."""
        return {
            "cu_seqlens_q": self.cu_q,
            "cu_seqlens_k": self.cu_k,
            "max_seqlen_q": self.plan.max_q,
            "max_seqlen_k": self.plan.max_k,
        }


@dataclass(frozen=True)
class Schedule:
    """The chunks of one packed batch, shared by all layers."""

    chunks: list[DeviceChunk]
    total: int

    @classmethod
    def make(
        cls, cu_seqlens: Sequence[int], chunk_size: int, device: torch.device, reverse: bool = False
    ) -> Schedule:
        """Plan chunks and put all their cumulative lengths on the device in one copy."""
        plans = plan_chunks(cu_seqlens, chunk_size)
        flat = [n for chunk in plans for n in (*chunk.cu_q, *chunk.cu_k)]
        lengths = torch.tensor(flat, dtype=torch.int32).to(device, non_blocking=True)
        chunks, at = [], 0
        for chunk in plans:
            entries = len(chunk.cu_q)
            cu_q, cu_k = lengths[at : at + 2 * entries].view(2, entries)
            chunks.append(DeviceChunk(chunk, cu_q, cu_k))
            at += 2 * entries
        return cls(chunks[::-1] if reverse else chunks, cu_seqlens[-1])


@dataclass
class _Work:
    """What forward and backward of one streamed layer share."""

    kv: KV | None
    rest: Rest
    positions: Tensor  # (n,)
    schedule: Schedule
    attention: dict[str, Any] = field(default_factory=dict)


def stream_layer(
    kv: KV,
    rest: Rest,
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    params: Sequence[Tensor],
    chunk_size: int | str = "auto",
    position_ids: Tensor | None = None,
    causal: bool = True,
    reverse: bool = False,
    **attention_kwargs: Any,
) -> Tensor:
    """Run one attention layer over packed rows, keeping only its input for the backward.

    ``kv`` and ``rest`` are called on chunks of rows, in the forward without a graph and again in the backward with one,
    so they must be deterministic and act row by row apart from ``attend``.

    Args:
        kv: ``kv(x (c, d), pos (c,)) -> k (c, Hkv, D), v (c, Hkv, Dv)``, positions already applied.
        rest: ``rest(x (c, d), pos (c,), attend) -> y (c, d_out)``, where ``attend(q (c, Hq, D)) -> (c, Hq, Dv)``; it calls
            ``attend`` at most once.
        x: ``(n, d)`` packed rows.
        cu_seqlens: int32 ``(B+1,)``, the documents' cumulative lengths, ending at n.
        params: the tensors whose gradients are wanted; gradients of others used inside are not formed.
        chunk_size: rows of a chunk, or ``"auto"``.
        position_ids: ``(n,)`` int64; default restarts at 0 in each document.
        causal: each row sees its document up to itself. Streaming needs this to be true.
        reverse: walk the chunks last to first; the result is the same to rounding.
        attention_kwargs: ``window``, ``softmax_scale``, ``softcap``, ``alibi_slopes`` (``(Hq,)``) of ``varlen_attention``.

    Returns:
        y ``(n, d_out)``, differentiable with respect to x and params, once.

    Raises:
        TypeError, ValueError: an argument breaks its contract.

    Source: StreamBP (arXiv 2506.03077), changed as the module's text says.
    """
    check_tensor("x", x, ndim=2, layout="(n, d)")
    check_cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0], x.device)
    if not causal:
        raise ValueError("causal must be True: a streamed chunk sees only keys up to its own end")
    allowed = {"window", "softmax_scale", "softcap", "alibi_slopes"}
    if unknown := sorted(set(attention_kwargs) - allowed):
        raise ValueError(
            f"stream_layer can't honour {', '.join(unknown)}; it takes {sorted(allowed)}"
        )
    lengths = cu_seqlens.tolist()
    if position_ids is None:
        starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=x.shape[0])
        position_ids = torch.arange(x.shape[0], device=x.device) - starts
    else:
        check_tensor(
            "position_ids", position_ids, shape=(x.shape[0],), device=x.device, layout="(n,)"
        )
    size = resolve_chunk_size(chunk_size, x.device)
    schedule = Schedule.make(lengths, size, x.device, reverse)
    return run_streamed(kv, rest, x, position_ids, schedule, params, attention_kwargs)


def run_streamed(
    kv: KV | None,
    rest: Rest,
    x: Tensor,
    positions: Tensor,
    schedule: Schedule,
    params: Sequence[Tensor],
    attention: dict[str, Any],
) -> Tensor:
    """``stream_layer`` after its checks; without ``kv`` it streams a row-wise function that never attends."""
    work = _Work(kv, rest, positions, schedule, attention)
    return _Streamed.apply(work, x, *params)


# --- attention of one chunk ---------------------------------------------------------------------------


@dataclass
class _Keys:
    """K and V of the layer and, in the backward, the buffers their gradients are added into."""

    k: Tensor  # (n, Hkv, D)
    v: Tensor  # (n, Hkv, Dv)
    dk: Tensor | None = None  # acc dtype
    dv: Tensor | None = None


class _Attend(torch.autograd.Function):
    """Attention of a chunk's queries over the layer's keys; dK and dV go into the layer's buffers.

    ``anchor`` requires a gradient so that the backward runs even where q doesn't need one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        anchor: Tensor,
        keys: _Keys,
        chunk: DeviceChunk,
        attention: dict[str, Any],
    ) -> Tensor:
        out, lse = _attend(q, keys, chunk, attention)
        ctx.save_for_backward(q, out, lse)
        ctx.keys, ctx.chunk, ctx.attention = keys, chunk, attention
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse = ctx.saved_tensors
        keys, chunk = ctx.keys, ctx.chunk
        dq = varlen_attention_backward(
            dout.contiguous(), q, keys.k[chunk.keys], keys.v[chunk.keys], out, lse,
            dk=keys.dk[chunk.keys], dv=keys.dv[chunk.keys], causal=True,
            **chunk.lengths(), **ctx.attention,
        )  # fmt: skip
        return dq, torch.zeros((), device=dq.device), None, None, None


def _attend(
    q: Tensor, keys: _Keys, chunk: DeviceChunk, attention: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    return varlen_attention(  # type: ignore[return-value]
        q, keys.k[chunk.keys], keys.v[chunk.keys], causal=True, return_lse=True,
        **chunk.lengths(), **attention,
    )  # fmt: skip


# --- the layer ----------------------------------------------------------------------------------------


class _Streamed(torch.autograd.Function):
    """A layer over packed rows; saves its input x (n, d) and nothing else.

    Parameters are inputs, so their gradients leave once however many chunks there were and hooks of DDP or FSDP fire once.
    """

    @staticmethod
    def forward(ctx: Any, work: _Work, x: Tensor, *params: Tensor) -> Tensor:
        ctx.work, ctx.params = work, params
        ctx.autocast = _autocast_state(x.device.type)
        ctx.save_for_backward(x)
        keys = _project(work, x)
        y = None
        for chunk in work.schedule.chunks:
            rows = chunk.rows
            attend = _forward_attend(keys, chunk, work.attention)
            part = work.rest(x[rows], work.positions[rows], attend)
            if y is None:
                y = part.new_empty(x.shape[0], *part.shape[1:])
            y[rows] = part
        return torch.empty_like(x) if y is None else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        work, params = ctx.work, ctx.params
        wanted = [p for p, need in zip(params, ctx.needs_input_grad[2:], strict=True) if need]
        sums = _GradientSums(wanted)
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        with ExitStack() as stack:
            stack.enter_context(ctx.autocast())
            stack.enter_context(_without_hooks(wanted))
            with torch.no_grad():
                keys = _project(work, x)
            if keys is not None:
                keys.dk = keys.k.new_zeros(keys.k.shape, dtype=acc_dtype(keys.k.dtype))
                keys.dv = keys.v.new_zeros(keys.v.shape, dtype=acc_dtype(keys.v.dtype))
            for chunk in work.schedule.chunks:
                _backward_rest(work, keys, chunk, x, dy, dx, sums)
            if keys is not None:
                _backward_kv(work, keys, x, dx, sums)
        grads = iter(sums.finish())
        param_grads = [next(grads) if need else None for need in ctx.needs_input_grad[2:]]
        return None, dx, *param_grads


def _forward_attend(keys: _Keys | None, chunk: DeviceChunk, attention: dict[str, Any]) -> Attend:
    def attend(q: Tensor) -> Tensor:
        assert keys is not None
        return _attend(q, keys, chunk, attention)[0]

    return attend


def _project(work: _Work, x: Tensor) -> _Keys | None:
    """K and V of all rows, formed chunk by chunk without a graph."""
    if work.kv is None:
        return None
    keys = None
    for chunk in work.schedule.chunks:
        k, v = work.kv(x[chunk.rows], work.positions[chunk.rows])
        if keys is None:
            keys = _Keys(
                k.new_empty(x.shape[0], *k.shape[1:]), v.new_empty(x.shape[0], *v.shape[1:])
            )
        keys.k[chunk.rows], keys.v[chunk.rows] = k, v
    return keys


def _backward_rest(
    work: _Work,
    keys: _Keys | None,
    chunk: DeviceChunk,
    x: Tensor,
    dy: Tensor,
    dx: Tensor | None,
    sums: _GradientSums,
) -> None:
    """Recompute one chunk with a graph and run it back: dx rows, parameter sums, dK and dV of its keys."""
    rows = chunk.rows
    anchor = torch.zeros((), device=x.device, requires_grad=True)

    def attend(q: Tensor) -> Tensor:
        return _Attend.apply(q, anchor, keys, chunk, work.attention)

    with torch.enable_grad():
        part = x[rows].detach().requires_grad_(dx is not None)
        y = work.rest(part, work.positions[rows], attend)
    sums.backward([y], [dy[rows]], part, anchor, None if dx is None else dx[rows], add=False)


def _backward_kv(
    work: _Work, keys: _Keys, x: Tensor, dx: Tensor | None, sums: _GradientSums
) -> None:
    """The way back through the K and V projections, once dK and dV are complete."""
    assert work.kv is not None and keys.dk is not None and keys.dv is not None
    for chunk in work.schedule.chunks:
        rows = chunk.rows
        with torch.enable_grad():
            part = x[rows].detach().requires_grad_(dx is not None)
            k, v = work.kv(part, work.positions[rows])
        grads = [keys.dk[rows].to(k.dtype), keys.dv[rows].to(v.dtype)]
        sums.backward([k, v], grads, part, None, None if dx is None else dx[rows], add=True)


class _GradientSums:
    """Sums of parameter gradients over chunks, in acc dtype."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.sums: list[Tensor | None] = [None] * len(params)

    def backward(
        self,
        outputs: list[Tensor],
        grads: list[Tensor],
        x: Tensor,
        anchor: Tensor | None,
        dx: Tensor | None,
        add: bool,
    ) -> None:
        """Differentiate one chunk's outputs; write or add its input gradient into the rows dx."""
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        inputs = [t for t in (anchor, x if dx is not None else None) if t is not None]
        if pairs and (inputs or self.params):
            found = torch.autograd.grad(
                [o for o, _ in pairs], [*inputs, *self.params], [g for _, g in pairs],
                allow_unused=True,
            )  # fmt: skip
        else:
            found = (None,) * (len(inputs) + len(self.params))
        if dx is not None:
            part = found[len(inputs) - 1]
            if not add:
                dx.zero_() if part is None else dx.copy_(part)
            elif part is not None:
                dx.add_(part)
        for i, grad in enumerate(found[len(inputs) :]):
            if grad is None:
                continue
            total = self.sums[i]
            if total is None:
                self.sums[i] = grad.to(acc_dtype(grad.dtype))
            else:
                total.add_(grad)

    def finish(self) -> list[Tensor]:
        """One gradient per parameter, in its dtype; zeros where no chunk used it."""
        return [
            torch.zeros_like(p) if total is None else total.to(p.dtype)
            for p, total in zip(self.params, self.sums, strict=True)
        ]


def _autocast_state(device_type: str) -> Callable[[], Any]:
    """A factory of contexts that restore the autocast state of now, for the recomputation."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)


@contextmanager
def _without_hooks(params: Sequence[Tensor]) -> Iterator[None]:
    """Lift tensor hooks off the parameters: they must see the summed gradient once, not every chunk's."""
    hooks = [(p, p._backward_hooks) for p in params if p._backward_hooks]
    for p, _ in hooks:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, saved in hooks:
            p._backward_hooks = saved
