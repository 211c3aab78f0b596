"""``stream_layer``: one decoder layer of your own, whose backward runs chunk by chunk over packed
rows.

K and V of a layer are formed in the forward while chunks of queries run against them, and once more
in the backward; dK and dV are added into float32 (float64) buffers with Hkv heads. Besides those
buffers and the layer's input only one chunk's activations ever exist. After StreamBP (Luo et al.,
2025), with K/V kept instead of re-projected per chunk, and chunks walked last to first in the
backward, so that a chunk's dK and dV are complete when its own turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varstream._checks import (
    FLOATING,
    INTEGERS,
    check_bool,
    check_cu_seqlens,
    check_tensor,
)
from varstream.streaming.attend import Attend, Options
from varstream.streaming.recompute import run_streamed
from varstream.streaming.schedule import DeviceChunk, Schedule, resolve_chunk_size

KV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Rest = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


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
    **attention_kwargs: Any,
) -> Tensor:
    """Run one attention layer over packed rows, keeping only its input for the backward.

    ``kv`` and ``rest`` are called on chunks of rows, in the forward without a graph and again in
    the backward with one, where torch's generators give the same random numbers (dropout) again.
    They must act row by row apart from ``attend``.
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
    schedule = Schedule.make(lengths, size, x.device)
    body = _Body(kv, rest, position_ids, attention_kwargs)
    return run_streamed(body, x, schedule, unique)[0]


def _check_params(params: Any) -> list[Tensor]:
    """A list of tensors, each once however often it was named."""
    if isinstance(params, Tensor | Mapping | str) or not isinstance(params, Iterable):
        raise TypeError(f"params must be a list of tensors, got {type(params).__name__}")
    params = list(params)  # module.parameters() can be walked once only
    for i, param in enumerate(params):
        check_tensor(f"params[{i}]", param)
    return list({id(p): p for p in params}.values())


@dataclass(frozen=True)
class _Body:
    """The user's two functions as the body of a streamed function."""

    kv: KV
    rest: Rest
    positions: Tensor  # (n,)
    options: Options

    def __call__(self, x: Tensor, chunk: DeviceChunk, attend: Attend) -> tuple[Tensor]:
        positions = self.positions[chunk.rows]
        pair = self.kv(x, positions)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"kv must return the pair (k, v), got {_kind(pair)}")
        for name, part in zip(("kv's k", "kv's v"), pair, strict=True):
            _check_rows(name, part, chunk.rows)
        attend.put(*pair)
        y = self.rest(x, positions, lambda q: attend(q, self.options))
        _check_rows("rest's result", y, chunk.rows)
        return (y,)


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
