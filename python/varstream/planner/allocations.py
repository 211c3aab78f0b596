"""Counting what runs on the meta device, where tensors have shapes and no memory.

``n`` rows of the packed batch, chunks of ``c`` rows. A tensor's bytes are a multiple of n, of c or
of neither; n and c are primes that nothing else has, so one run tells which.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from varstream.planner.trace import (
    ATTENTION,
    ATTENTION_BACKWARD,
    FORWARD,
    AttentionShape,
    Line,
)

_ATTENTION_OPS = {
    torch.ops.varstream.varlen_attention.default: ATTENTION,
    torch.ops.varstream.varlen_attention_bwd_accumulate.default: ATTENTION_BACKWARD,
}
_POINTWISE = {
    getattr(torch.ops.aten, name).Tensor
    for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")
}


class Allocations(TorchDispatchMode):
    """Bytes of meta tensors that live, operator by operator."""

    def __init__(self, n: int, c: int) -> None:
        super().__init__()
        self.n, self.c = n, c
        self.phase = FORWARD
        self.live = [0.0, 0.0, 0.0]  # constant, a row of n, a row of c
        self.lines: list[Line] = []  # after each operator
        self.attention: AttentionShape | None = None
        self._known: set[int] = set()

    def ignore(self, tensors: Iterable[Any]) -> None:
        """What exists already: parameters, inputs. They have to outlive the count."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0  # branches on values, such as a rotary table's for long inputs: not taken
        if func is torch.ops.aten._grouped_mm.default:
            out = _grouped_product(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if func is torch.ops.varstream.varlen_attention.default:
            self.attention = _attention_shape(*args)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        line = Line(_ATTENTION_OPS.get(func, self.phase), *self.live)
        self.lines.append(line)
        if func in _POINTWISE:
            self.lines += self._converted(line, [t for t in args if isinstance(t, Tensor)])
        return out

    def _converted(self, line: Line, operands: list[Tensor]) -> list[Line]:
        """On the CPU operands of another dtype than the result's are converted in whole."""
        wide = max((t.element_size() for t in operands if t.is_floating_point()), default=0)
        sizes = [0.0, 0.0, 0.0]
        for t in operands:
            if t.dim() and t.is_floating_point() and t.element_size() < wide:
                unit, amount = self._units(t.numel() * wide)
                sizes[unit] += amount
        return [line.above([-size for size in sizes])] if any(sizes) else []

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        unit, amount = self._units(size)
        self.live[unit] += amount
        weakref.finalize(storage, self._release, key, unit, amount)

    def _units(self, size: int) -> tuple[int, float]:
        """What a size is a multiple of, as a place in ``live``, and of how much."""
        for unit, rows in ((1, self.n), (2, self.c)):
            if size % rows == 0:
                return unit, size / rows
        return 0, float(size)

    def _release(self, key: int, unit: int, amount: float) -> None:
        self._known.discard(key)
        self.live[unit] -= amount


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """A product by groups of rows; torch's meta function knows bfloat16 only."""
    if b.dim() == 3:  # (S, k), (G, k, m)
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])  # (k, S), (S, m)


def _attention_shape(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> AttentionShape:
    """From the arguments of ``torch.ops.varstream.varlen_attention``."""
    left, softcap, dropout = rest[9], rest[12], rest[13]
    return AttentionShape(
        q.shape[1], k.shape[1], q.shape[2], v.shape[2], left, float(softcap), float(dropout)
    )
