"""``stream_layer``: one decoder layer whose backward runs chunk by chunk over packed rows.

K and V are formed once for the whole layer; chunks of queries then run against them, and their
backward adds dK and dV into float32 (float64) buffers with Hkv heads. Besides those buffers and the
layer's input only one chunk's activations ever exist. After StreamBP (Luo et al., 2025), with K/V
kept instead of re-projected per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from varstream._checks import (
    FLOATING,
    INTEGERS,
    acc_dtype,
    check_bool,
    check_cu_seqlens,
    check_tensor,
)
from varstream.ops._autocast import cast_for_autocast
from varstream.ops.attention_call import Call, check_call, in_kernel_layout
from varstream.streaming.gradients import GradientSums, without_hooks
from varstream.streaming.schedule import DeviceChunk, Schedule, resolve_chunk_size

Attend = Callable[[Tensor], Tensor]
KV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Rest = Callable[[Tensor, Tensor, Attend], Tensor]


@dataclass
class _Work:
    """What forward and backward of one streamed layer share."""

    kv: KV | None
    rest: Rest
    positions: Tensor  # (n,)
    schedule: Schedule
    attention: dict[str, Any] = field(default_factory=dict)


@torch._disable_dynamo  # the loop over chunks stays outside compiled graphs
def stream_layer(
    kv: KV,
    rest: Rest,
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    params: Iterable[Tensor],
    chunk_size: int | str = "auto",
    position_ids: Tensor | None = None,
    causal: bool = True,
    reverse: bool = False,
    **attention_kwargs: Any,
) -> Tensor:
    """Run one attention layer over packed rows, keeping only its input for the backward.

    ``kv`` and ``rest`` are called on chunks of rows, in the forward without a graph and again in
    the backward with one, so they must be deterministic and act row by row apart from ``attend``.
    The backward is bitwise repeatable where ``torch.use_deterministic_algorithms`` asks for it.
    Under ``torch.compile`` the call runs as it is, outside the graph.

    Args:
        kv: ``kv(x (c, d), pos (c,)) -> k (c, Hkv, D), v (c, Hkv, Dv)``, positions already applied.
        rest: ``rest(x (c, d), pos (c,), attend) -> y (c, d_out)``, where ``attend(q (c, Hq, D)) ->
            (c, Hq, Dv)``; it may call ``attend`` any number of times.
        x: ``(n, d)`` packed rows.
        cu_seqlens: int32 ``(B+1,)``, the documents' cumulative lengths, ending at n; read here
            once to plan the chunks (the call's one device synchronisation on CUDA).
        params: the tensors whose gradients are wanted, such as ``layer.parameters()``; gradients
            of others used inside are not formed.
        chunk_size: rows of a chunk, or ``"auto"``: 1024 on the CPU, 4096 on CUDA. Nothing is known
            here of the layer's memory, so nothing is planned.
        position_ids: ``(n,)`` int64 or int32; default restarts at 0 in each document.
        causal: each row sees its document up to itself. Streaming needs this to be true.
        reverse: walk the chunks last to first; the result is the same to rounding.
        attention_kwargs: ``window``, ``softmax_scale``, ``softcap``, ``alibi_slopes`` (``(Hq,)``)
            of ``varlen_attention``.

    Returns:
        y ``(n, d_out)``, differentiable with respect to x and params, once.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it. What ``kv``,
            ``rest`` and ``attend`` are given or return is checked when they run.

    Source: StreamBP (arXiv 2506.03077), changed as the module's text says.
    """
    for name, function in (("kv", kv), ("rest", rest)):
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    check_tensor("x", x, ndim=2, layout="(n, d)")
    check_tensor("x", x, dtypes=FLOATING)
    check_cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0], x.device)
    if not check_bool("causal", causal):
        raise ValueError("causal must be True: a streamed chunk sees only keys up to its own end")
    check_bool("reverse", reverse)
    unique = _check_params(params)
    allowed = {"window", "softmax_scale", "softcap", "alibi_slopes"}
    if unknown := sorted(set(attention_kwargs) - allowed):
        raise ValueError(
            f"stream_layer can't honour {', '.join(unknown)}; it takes {sorted(allowed)}"
        )
    if (slopes := attention_kwargs.get("alibi_slopes")) is not None:
        # A row of slopes for each document would need the documents of each chunk.
        check_tensor("alibi_slopes", slopes, ndim=1, layout="(Hq,)")
        check_tensor("alibi_slopes", slopes, dtypes=FLOATING, device=x.device)
    lengths = cu_seqlens.tolist()
    if position_ids is None:
        starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=x.shape[0])
        position_ids = torch.arange(x.shape[0], device=x.device) - starts
    else:
        shape = (x.shape[0],)
        check_tensor("position_ids", position_ids, shape=shape, device=x.device, layout="(n,)")
        check_tensor("position_ids", position_ids, dtypes=INTEGERS)
    size = resolve_chunk_size(chunk_size, x.device)
    schedule = Schedule.make(lengths, size, x.device, reverse)
    return run_streamed(kv, rest, x, position_ids, schedule, unique, attention_kwargs)


def _check_params(params: Any) -> list[Tensor]:
    """A list of tensors, each once however often it was named."""
    if isinstance(params, Tensor | Mapping | str) or not isinstance(params, Iterable):
        raise TypeError(f"params must be a list of tensors, got {type(params).__name__}")
    params = list(params)  # module.parameters() can be walked once only
    for i, param in enumerate(params):
        check_tensor(f"params[{i}]", param)
    return list({id(p): p for p in params}.values())


def run_streamed(
    kv: KV | None,
    rest: Rest,
    x: Tensor,
    positions: Tensor,
    schedule: Schedule,
    params: Sequence[Tensor],
    attention: dict[str, Any],
) -> Tensor:
    """``stream_layer`` after its checks; without ``kv`` it streams a row-wise function that never
    attends."""
    work = _Work(kv, rest, positions, schedule, attention)
    return _Streamed.apply(work, x, *params)


# --- attention of one chunk -----------------------------------------------------------------------


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
        out, lse, ctx.call = _attend(q, keys, chunk, attention)
        ctx.save_for_backward(q, out, lse)
        ctx.keys, ctx.chunk = keys, chunk
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse = ctx.saved_tensors
        keys, rows = ctx.keys, ctx.chunk.keys
        # The operator itself: the forward has checked these arguments.
        dq = torch.ops.varstream.varlen_attention_bwd_accumulate(
            dout,
            q,
            keys.k[rows],
            keys.v[rows],
            out,
            lse,
            None,
            *ctx.call,
            keys.dk[rows],
            keys.dv[rows],
            None,
        )
        return dq, torch.zeros((), device=dq.device), None, None, None


_UNUSED: dict[str, Any] = {"seqused_k": None, "sinks": None, "dropout_p": 0.0, "rng_state": None}
_DEFAULTS: dict[str, Any] = {
    "window": (-1, -1),
    "softmax_scale": None,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def _attend(
    q: Tensor, keys: _Keys, chunk: DeviceChunk, attention: dict[str, Any]
) -> tuple[Tensor, Tensor, Call]:
    """out (c, Hq, Dv), lse (Hq, c) and the operator's arguments, which the backward takes too."""
    slopes = attention.get("alibi_slopes")
    if slopes is not None and isinstance(q, Tensor) and q.dim() == 3:
        check_tensor("alibi_slopes", slopes, shape=q.shape[1:2], layout="(Hq,)")
    k, v = keys.k[chunk.keys], keys.v[chunk.keys]
    call = check_call(
        q,
        k,
        v,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **chunk.lengths(),
        **_UNUSED,
        **_DEFAULTS | attention,
    )
    out, lse = torch.ops.varstream.varlen_attention(q, k, v, *call)
    return out, lse, call


def _queries(q: Tensor) -> Tensor:
    """A function's own queries, of any strides and dtype, as the operator takes them."""
    return in_kernel_layout(*cast_for_autocast(q))


# --- the layer ------------------------------------------------------------------------------------


class _Streamed(torch.autograd.Function):
    """A layer over packed rows; saves its input x (n, d) and nothing else.

    Parameters are inputs, so their gradients leave once however many chunks there were and hooks of
    DDP or FSDP fire once.
    """

    @staticmethod
    def forward(ctx: Any, work: _Work, x: Tensor, *params: Tensor) -> Tensor:
        ctx.work, ctx.params = work, params
        ctx.autocast = _autocast_state(x.device.type)
        ctx.save_for_backward(x, *params)  # params: so that autograd notices changes in place
        keys = _project(work, x)
        y = None
        for chunk in work.schedule.chunks:
            rows = chunk.rows
            attend = _forward_attend(keys, chunk, work.attention)
            part = work.rest(x[rows], work.positions[rows], attend)
            _check_rows("rest's result", part, rows)
            if y is None:
                y = part.new_empty(x.shape[0], *part.shape[1:])
            y[rows] = part
        assert y is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only create_graph=True runs a backward with gradients on
            raise RuntimeError(
                "a streamed layer has no second derivative: create_graph=True is refused"
            )
        x, *_ = ctx.saved_tensors
        work, params = ctx.work, ctx.params
        wanted = [p for p, need in zip(params, ctx.needs_input_grad[2:], strict=True) if need]
        sums = GradientSums(wanted)
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        with ExitStack() as stack:
            stack.enter_context(ctx.autocast())
            stack.enter_context(without_hooks(wanted))
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


def _check_rows(name: str, part: Tensor, rows: slice) -> None:
    """What the user's functions return must have a row for each row they were given."""
    count = rows.stop - rows.start
    if not isinstance(part, Tensor) or part.dim() < 2 or part.shape[0] != count:
        raise ValueError(f"{name} must have the chunk's {count} rows, got {_kind(part)}")


def _kind(value: Any) -> str:
    """What a user's function returned, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"{type(value).__name__}{size}"


def _forward_attend(keys: _Keys | None, chunk: DeviceChunk, attention: dict[str, Any]) -> Attend:
    def attend(q: Tensor) -> Tensor:
        assert keys is not None
        return _attend(_queries(q), keys, chunk, attention)[0]

    return attend


def _project(work: _Work, x: Tensor) -> _Keys | None:
    """K and V of all rows, formed chunk by chunk without a graph."""
    if work.kv is None:
        return None
    keys = None
    for chunk in work.schedule.chunks:
        pair = work.kv(x[chunk.rows], work.positions[chunk.rows])
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"kv must return the pair (k, v), got {_kind(pair)}")
        k, v = cast_for_autocast(*pair)
        _check_rows("kv's k", k, chunk.rows)
        _check_rows("kv's v", v, chunk.rows)
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
    sums: GradientSums,
) -> None:
    """Recompute one chunk with a graph and run it back: dx rows, parameter sums, dK and dV of its
    keys."""
    rows = chunk.rows
    anchor = torch.zeros((), device=x.device, requires_grad=True)

    def attend(q: Tensor) -> Tensor:
        return _Attend.apply(_queries(q), anchor, keys, chunk, work.attention)

    with torch.enable_grad():
        part = x[rows].detach().requires_grad_(dx is not None)
        y = work.rest(part, work.positions[rows], attend)
    sums.backward([y], [dy[rows]], part, anchor, None if dx is None else dx[rows], add=False)


def _backward_kv(
    work: _Work, keys: _Keys, x: Tensor, dx: Tensor | None, sums: GradientSums
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


def _autocast_state(device_type: str) -> Callable[[], Any]:
    """A factory of contexts that restore the autocast state of now, for the recomputation."""
    if device_type == "meta":  # unknown to autocast
        return nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
