"""Building blocks of the chunked head: the projection, the rows that take part, sums of gradients.

``N`` rows, hidden size ``d``, ``V`` classes, chunks of ``C`` rows. Everything is computed in the
accumulation dtype, float64 for float64 tensors, else float32, so low-precision weights are widened
a few thousand rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from varstream._checks import acc_dtype

# Rows and bytes of a chunk's (C, V) buffer: enough rows for the matrix products to run near full
# speed (a GPU needs more of them), few enough that the buffer stays small beside the gradients.
CHUNK_LIMITS = {"cpu": (512, 256 << 20), "cuda": (2048, 1 << 30)}
MIN_CHUNK_ROWS = 64

# Elements of one row block of the softcap and entropy passes: their temporaries stay in the cache.
_BLOCK_ELEMENTS = 1 << 19
# Elements of one block of the weight: in the logits' product on the CPU, which runs a little faster
# when that block and its logits stay in the cache, and where a low-precision weight is widened.
_WEIGHT_ELEMENTS = 1 << 21
_MIN_WEIGHT_ROWS = 512

_softmax_out = torch.ops.aten._softmax.out


def auto_chunk_size(classes: int, itemsize: int, device: str = "cpu") -> int:
    """Rows of a chunk when the caller names none.

    512 on the CPU and 2048 on a GPU; fewer, down to 64, where ``(C, V)`` in the accumulation dtype
    would pass 256 MiB or 1 GiB.
    """
    rows, limit = CHUNK_LIMITS.get(device, CHUNK_LIMITS["cuda"])
    return max(MIN_CHUNK_ROWS, min(rows, limit // max(1, classes * itemsize)))


@dataclass(frozen=True)
class Head:
    """The projection and what follows it: ``softcap(logit_scale * (x W^T + b)) / temperature``."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float
    temperature: float

    @property
    def acc(self) -> torch.dtype:
        return acc_dtype(self.weight.dtype)

    @property
    def product_scale(self) -> float:
        """Factor of the matrix product; with a softcap the product is the argument of tanh."""
        return self.logit_scale / (self.softcap if self.softcap > 0 else self.temperature)

    @property
    def cap_scale(self) -> float:
        """logits = cap_scale * tanh(product)."""
        return self.softcap / self.temperature

    @property
    def gradient_scale(self) -> float:
        """d logits / d (x W^T + b), apart from the softcap's ``1 - tanh^2``."""
        return self.logit_scale / self.temperature

    def weight_blocks(self, split: bool) -> Iterator[tuple[int, int, Tensor]]:
        """The weight (V, d) in acc dtype, in blocks of rows where it is widened or ``split``."""
        classes, width = self.weight.shape
        rows = max(_MIN_WEIGHT_ROWS, _WEIGHT_ELEMENTS // max(1, width))
        if self.weight.dtype == self.acc and not split:
            rows = max(1, classes)
        for start in range(0, classes, rows):
            stop = min(start + rows, classes)
            yield start, stop, self.weight[start:stop].to(self.acc)

    def product(self, x: Tensor, out: Tensor) -> None:
        """``x`` (C, d) in acc dtype -> ``out`` (C, V): scaled product, through tanh if capped."""
        scale = self.product_scale
        for start, stop, block in self.weight_blocks(out.device.type == "cpu"):
            part = out[:, start:stop]
            if self.bias is None:
                part.addmm_(x, block.t(), beta=0, alpha=scale)
            else:
                bias = self.bias[start:stop].to(self.acc)
                torch.addmm(bias, x, block.t(), beta=scale, alpha=scale, out=part)
        if self.softcap > 0:
            out.tanh_()

    def input_gradient(self, g: Tensor, out: Tensor) -> None:
        """``g`` (C, V) -> ``out`` (C, d) in acc dtype."""
        for start, stop, block in self.weight_blocks(False):
            beta = 0 if start == 0 else 1
            out.addmm_(g[:, start:stop], block, beta=beta, alpha=self.gradient_scale)


@dataclass(frozen=True)
class Rows:
    """Rows that take part: all ``total`` of them (``index`` None) or an ascending index."""

    index: Tensor | None
    count: int
    total: int

    def chunks(self, size: int) -> Iterator[slice | Tensor]:
        """Cut into pieces of at most ``size`` rows, as even as possible.

        A run of consecutive rows comes as a slice (a view of the input), others as an index.
        """
        pieces = -(-self.count // size)
        for piece in range(pieces):
            start = self.count * piece // pieces
            stop = self.count * (piece + 1) // pieces
            if self.index is None:
                yield slice(start, stop)
                continue
            index = self.index[start:stop]
            first, last = int(index[0]), int(index[-1])
            yield slice(first, last + 1) if last - first == stop - start - 1 else index

    def largest_chunk(self, size: int) -> int:
        """Rows of the largest chunk."""
        return 0 if self.count == 0 else -(-self.count // -(-self.count // size))


def select_rows(mask: Tensor) -> Rows:
    """Rows where ``mask`` (N,) holds."""
    total = mask.shape[0]
    index = mask.nonzero().view(-1)
    count = index.shape[0]
    return Rows(None if count == total else index, count, total)


def check_targets(target: Tensor, ignore_index: int, classes: int) -> Tensor:
    """Refuse classes outside ``[0, V)``; returns the mask (N,) of rows that are not ignored."""
    valid = target != ignore_index
    wrong = valid & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target must hold classes in [0, {classes}) or ignore_index={ignore_index}, "
            f"got {int(target[row])} at row {row}"
        )
    return valid


def take(values: Tensor, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """``values[rows]`` in ``dtype``: a view where that is possible."""
    part = values[rows] if isinstance(rows, slice) else values.index_select(0, rows)
    return part.to(dtype)


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors that share their rows so that a block of the first, (C, V), fits the cache."""
    size = max(1, _BLOCK_ELEMENTS // max(1, tensors[0].shape[1]))
    return zip(*(t.split(size) for t in tensors), strict=True)


def softmax_in_place(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits (C, V) into probabilities in place.

    Returns ``z_t - max``, ``log sum e^(z - max)`` and ``max``, all (C,). The largest probability is
    e^0 over the sum, so the sum comes back without a second exponential, and neither term sees the
    offset of the logits nor an underflow of p_t.
    """
    peak = z.amax(1)
    gap = z.gather(1, target[:, None]).squeeze(1) - peak
    if z.device.type == "cpu":
        _softmax_out(z, 1, False, out=z)  # one pass a row, each row read before it is written
    else:
        z.sub_(peak[:, None]).exp_()
        z.div_(z.sum(1, keepdim=True))
    return gap, z.amax(1).log_().neg_(), peak


def add_at_target(z: Tensor, target: Tensor, value: Tensor) -> None:
    """``z[i, target[i]] += value[i]``: one entry a row, hence deterministic."""
    z.scatter_add_(1, target[:, None], value[:, None])


def capped_gradient_(u: Tensor, g: Tensor) -> None:
    """``u <- g * (1 - u^2)``: through the softcap, ``u`` its tanh."""
    u.square_().neg_().add_(1).mul_(g)


class Gradients:
    """Gradients being summed over chunks; those not wanted are empty and skipped."""

    def __init__(self, x: Tensor, head: Head, rows: Rows, needs: tuple[bool, bool, bool]) -> None:
        need_input, self.need_weight, self.need_bias = needs
        self.need_input = need_input
        self.head = head
        self.fresh = True
        # Ignored rows are never written, so only they need the zeros; a first chunk overwrites.
        dense, width = rows.count == rows.total, head.weight.shape[1]
        make = x.new_empty if dense else x.new_zeros
        self.input = make((x.shape[0], width) if need_input else (0,))
        make = x.new_zeros if rows.count == 0 else x.new_empty
        self.weight = make(head.weight.shape if self.need_weight else (0,), dtype=head.acc)
        self.bias = make(head.weight.shape[:1] if self.need_bias else (0,), dtype=head.acc)

    def add(self, rows: slice | Tensor, x: Tensor, g: Tensor, coef: Tensor | None = None) -> None:
        """Add a chunk: ``x`` (C, d) in acc dtype, ``g`` (C, V), its rows times ``coef`` (C,).

        The row factor goes into the narrow operands, which saves a pass over (C, V).
        """
        scale = self.head.gradient_scale
        beta = 0 if self.fresh else 1
        self.fresh = False
        if self.need_input:
            self._input_rows(rows, x, g, coef)
        if self.need_weight:
            narrow = x if coef is None else x * coef[:, None]
            self.weight.addmm_(g.t(), narrow, beta=beta, alpha=scale)
        if self.need_bias:
            factor = g.new_ones(g.shape[0]) if coef is None else coef
            self.bias.addmv_(g.t(), factor, beta=beta, alpha=scale)

    def _input_rows(self, rows: slice | Tensor, x: Tensor, g: Tensor, coef: Tensor | None) -> None:
        direct = isinstance(rows, slice) and self.input.dtype == x.dtype
        part = self.input[rows] if direct else torch.empty_like(x)
        self.head.input_gradient(g, part)
        if coef is not None:
            part.mul_(coef[:, None])
        if not direct:
            self.input[rows] = part.to(self.input.dtype)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input, self.weight, self.bias
