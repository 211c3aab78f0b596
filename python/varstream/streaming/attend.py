"""Attention of one chunk's queries over the layer's keys: in the forward, while K and V are formed,
and in the backward, whose dK and dV go into the layer's buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from varstream._checks import acc_dtype, check_tensor
from varstream.ops._autocast import cast_for_autocast
from varstream.ops.attention_call import Call, check_call, in_kernel_layout
from varstream.streaming.schedule import DeviceChunk

Options = dict[str, Any]
_DEFAULTS: Options = {
    "window": (-1, -1),
    "softmax_scale": None,
    "softcap": 0.0,
    "alibi_slopes": None,
    "dropout_p": 0.0,
}
_UNUSED: Options = {"seqused_k": None, "sinks": None, "rng_state": None}


class Projected(Exception):
    """Leaves a layer that ran only to form its K and V."""


@dataclass
class Keys:
    """K and V of a layer's n rows and, in the backward, the buffers their gradients are added into.

    The buffers appear with the first chunk, which knows their shapes.
    """

    rows: int  # n
    k: Tensor | None = None  # (n, Hkv, D)
    v: Tensor | None = None  # (n, Hkv, Dv)
    dk: Tensor | None = None  # acc dtype
    dv: Tensor | None = None

    def store(self, chunk: DeviceChunk, k: Tensor, v: Tensor) -> None:
        if self.k is None or self.v is None:
            self.k = k.new_empty(self.rows, *k.shape[1:])
            self.v = v.new_empty(self.rows, *v.shape[1:])
        self.k[chunk.rows], self.v[chunk.rows] = k, v

    def seen_by(self, chunk: DeviceChunk) -> tuple[Tensor, Tensor]:
        assert self.k is not None and self.v is not None
        return self.k[chunk.keys], self.v[chunk.keys]

    def start_gradients(self) -> None:
        if self.k is not None and self.v is not None:
            self.dk = self.k.new_zeros(self.k.shape, dtype=acc_dtype(self.k.dtype))
            self.dv = self.v.new_zeros(self.v.shape, dtype=acc_dtype(self.v.dtype))


class Attend:
    """What a layer's body is given to attend with: first ``put`` its own k and v, then call it with
    queries, any number of times. Chunks come first to last, so all keys that it sees are there."""

    projects = False  # leaves at ``put``: queries aren't needed

    def __init__(self, keys: Keys, chunk: DeviceChunk) -> None:
        self.keys, self.chunk = keys, chunk

    def put(self, k: Tensor, v: Tensor) -> None:
        """k (c, Hkv, D) and v (c, Hkv, Dv) of the chunk's own rows."""
        k, v = cast_for_autocast(k, v)
        self.keys.store(self.chunk, k, v)

    def __call__(self, q: Tensor, options: Options) -> Tensor:
        """q (c, Hq, D) to (c, Hq, Dv)."""
        return _attend(_queries(q), self.keys, self.chunk, options)[0]


class AttendProject(Attend):
    """Forms K and V and leaves."""

    projects = True

    def put(self, k: Tensor, v: Tensor) -> NoReturn:
        super().put(k, v)
        raise Projected


class AttendBackward(Attend):
    """Attends with a graph. All K and V are there, and dK and dV of the chunk's own rows are
    complete once the chunk's attention has run back: later chunks, which see them, went before."""

    anchor: Tensor | None = None

    def put(self, k: Tensor, v: Tensor) -> None:
        self.anchor = _Own.apply(*cast_for_autocast(k, v), self.keys, self.chunk)

    def __call__(self, q: Tensor, options: Options) -> Tensor:
        assert self.anchor is not None
        return _AttendBackward.apply(_queries(q), self.anchor, self.keys, self.chunk, options)


class _Own(torch.autograd.Function):
    """The chunk's own k and v, whose values are in the layer's buffers already. The result, a zero,
    ties every attention of the chunk to them, so that their gradients are read last."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, keys: Keys, chunk: DeviceChunk) -> Tensor:
        ctx.keys, ctx.rows, ctx.dtypes = keys, chunk.rows, (k.dtype, v.dtype)
        return torch.zeros((), device=k.device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        keys, (k_dtype, v_dtype) = ctx.keys, ctx.dtypes
        return keys.dk[ctx.rows].to(k_dtype), keys.dv[ctx.rows].to(v_dtype), None, None


class _AttendBackward(torch.autograd.Function):
    """Attention of a chunk's queries over the layer's keys; dK and dV go into the layer's
    buffers."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, anchor: Tensor, keys: Keys, chunk: DeviceChunk, options: Options
    ) -> Tensor:
        out, lse, ctx.call = _attend(q, keys, chunk, options)
        ctx.save_for_backward(q, out, lse)
        ctx.keys, ctx.chunk = keys, chunk
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse = ctx.saved_tensors
        keys, chunk = ctx.keys, ctx.chunk
        # The operator itself: the forward has checked these arguments.
        dq = torch.ops.varstream.varlen_attention_bwd_accumulate(
            dout,
            q,
            *keys.seen_by(chunk),
            out,
            lse,
            None,
            *ctx.call,
            keys.dk[chunk.keys],
            keys.dv[chunk.keys],
            None,
        )
        return dq, torch.zeros((), device=dq.device), None, None, None


def _attend(
    q: Tensor, keys: Keys, chunk: DeviceChunk, options: Options
) -> tuple[Tensor, Tensor, Call]:
    """out (c, Hq, Dv), lse (Hq, c) and the operator's arguments, which the backward takes too."""
    slopes = options.get("alibi_slopes")
    if slopes is not None and isinstance(q, Tensor) and q.dim() == 3:
        check_tensor("alibi_slopes", slopes, shape=q.shape[1:2], layout="(Hq,)")
    k, v = keys.seen_by(chunk)
    call = check_call(
        q,
        k,
        v,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **chunk.lengths(),
        **_UNUSED,
        **_DEFAULTS | options,
    )
    out, lse = torch.ops.varstream.varlen_attention(q, k, v, *call)
    return out, lse, call


def _queries(q: Tensor) -> Tensor:
    """A body's queries, of any strides and dtype, as the operator takes them."""
    return in_kernel_layout(*cast_for_autocast(q))
