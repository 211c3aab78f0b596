"""Backwards of ``attention_ways`` alone, and backwards that add into buffers: of a pack, and of a
sequence's queries chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import varstream as vs

from .attention_ways import Pack, Way, float32

Run = Callable[[], Sequence[Tensor]]


def reference(p: Pack) -> Sequence[Tensor]:
    """dq, dk, dv in float32; nothing of it stays in memory."""
    wide = p.float32()
    return torch.autograd.grad(float32(wide), wide.tensors, wide.dout)


class Gradients:
    """dq, dk, dv of one way: a call runs the backward alone, the first one the forward before it.

    With ``padded`` they are those of the padded batch.
    """

    def __init__(self, way: Way, pack: Pack, padded: bool = False) -> None:
        self._way, self._pack, self._padded = way, pack, padded

    @cached_property
    def _graph(self) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        p = self._pack
        leaves = p.padded if self._padded else p.tensors
        return self._way(p), leaves, p.pad(p.dout) if self._padded else p.dout

    def __call__(self) -> Sequence[Tensor]:
        return torch.autograd.grad(*self._graph, retain_graph=True)


@contextmanager
def _torch_repeats() -> Iterator[None]:
    """torch's operators give the same bits each time; memory isn't filled for that."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def deterministic(run: Run) -> Run:
    """The run with torch's deterministic algorithms, which its attention follows."""

    def call() -> Sequence[Tensor]:
        with _torch_repeats():
            return run()

    return call


# --- into buffers ---------------------------------------------------------------------------------

Buffers = tuple[Tensor, Tensor]  # dk and dv (total_k, Hkv, D), float32


def buffers(p: Pack) -> Buffers:
    """Zeros for dk and dv."""
    dk, dv = (torch.zeros_like(t, dtype=torch.float32, requires_grad=False) for t in (p.k, p.v))
    return dk, dv


class Accumulated:
    """``vs.varlen_attention_backward``: returns dq, dk, dv, the latter two added into the same
    buffers by every call. The forward runs once, before the first call."""

    def __init__(self, pack: Pack, into: Buffers | None = None) -> None:
        self._pack = pack
        self._into = into or buffers(pack)

    @cached_property
    def _options(self) -> dict[str, Any]:
        p = self._pack
        longest = {"max_seqlen_q": p.longest, "max_seqlen_k": p.longest_key}
        return {"cu_seqlens_q": p.cu, "cu_seqlens_k": p.cu_k, "causal": p.causal, **longest}

    @cached_property
    def _operands(self) -> tuple[Tensor, ...]:
        """dout, q, k, v, out, lse."""
        q, k, v = (t.detach() for t in self._pack.tensors)
        out, lse = vs.varlen_attention(q, k, v, **self._options, return_lse=True)
        return self._pack.dout, q, k, v, out, lse

    def __call__(self) -> Sequence[Tensor]:
        dk, dv = self._into
        dq = vs.varlen_attention_backward(*self._operands, **self._options, dk=dk, dv=dv)
        return dq, dk, dv


class Added:
    """The backward of another way, its dk and dv added into buffers by every call."""

    def __init__(self, way: Way, pack: Pack, into: Buffers | None = None) -> None:
        self._run = Gradients(way, pack)
        self._into = into or buffers(pack)

    def __call__(self) -> Sequence[Tensor]:
        dq, *found = self._run()
        for buffer, gradient in zip(self._into, found, strict=True):
            buffer.add_(gradient)
        return dq, *self._into


# --- chunk by chunk -------------------------------------------------------------------------------


def chunks(p: Pack, size: int) -> list[Pack]:
    """Packs of ``size`` queries each with the keys up to their last, of a pack of one causal
    sequence; they share its memory."""
    (length,) = p.lengths
    found = []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        q, k, v = (
            t.detach()[rows].requires_grad_()
            for t, rows in zip(p.tensors, (slice(begin, end), slice(end), slice(end)), strict=True)
        )
        part = replace(p, q=q, k=k, v=v, dout=p.dout[begin:end], lengths=(end - begin,))
        found.append(replace(part, prefix=begin))
    return found


class Streamed:
    """The backward of one causal sequence in chunks of queries, each adding its dk and dv into the
    sequence's buffers. Ours adds within the call; another way's gradients are added after it."""

    def __init__(self, pack: Pack, size: int, way: Way | None = None) -> None:
        self._into = dk, dv = buffers(pack)
        self._parts: list[Run] = []
        for p in chunks(pack, size):
            into = dk[: p.longest_key], dv[: p.longest_key]
            self._parts.append(Accumulated(p, into) if way is None else Added(way, p, into))

    def __call__(self) -> Sequence[Tensor]:
        """dq of every chunk, then dk and dv."""
        return *(part()[0] for part in self._parts), *self._into

    @staticmethod
    def whole(found: Sequence[Tensor]) -> list[Tensor]:
        """dq, dk, dv of the sequence from what a call returned."""
        *dq, dk, dv = found
        return [torch.cat(dq), dk, dv]
