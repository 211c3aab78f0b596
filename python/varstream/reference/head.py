"""Building blocks of the chunked head: the projection, the softmax of a chunk, sums over classes.

``N`` rows, hidden size ``d``, ``V`` classes, chunks of ``C`` rows. Everything is computed in the
accumulation dtype, float64 for float64 tensors, else float32, so low-precision weights are widened
a few thousand rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from varstream._checks import acc_dtype

# Rows and bytes of a chunk's (C, V) buffer: enough rows for the matrix products to run near full
# speed (a GPU needs more of them), few enough that the buffer stays small beside the gradients.
CHUNK_LIMITS = {"cpu": (512, 256 << 20), "cuda": (2048, 1 << 30)}
MIN_CHUNK_ROWS = 64

# Elements of one row block of the softcap, entropy and statistics passes, whose temporaries stay in
# the cache.
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


class Chunking(NamedTuple):
    """How a call walks its rows."""

    chunk_size: int  # rows of a chunk, 0 for the automatic rule
    max_rows: int | None = None  # the caller's bound on the rows that take part
    logits_dtype: torch.dtype | None = None  # None: the accumulation dtype

    def check_composed(self, head: Head, rows: int) -> None:
        """Refuse what composed kernels can't do, and a bound that ``rows`` passes."""
        if self.logits_dtype not in (None, head.acc):
            raise ValueError(
                f"logits_dtype must be None or {head.acc} here: only the CUDA kernels of bfloat16, "
                f"float16 and float32 store other logits, got {self.logits_dtype}"
            )
        if self.max_rows is not None and rows > self.max_rows:
            raise ValueError(
                f"max_rows must bound the rows that take part, {rows} of them, got {self.max_rows}"
            )


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


def _block_rows(z: Tensor) -> int:
    return max(1, _BLOCK_ELEMENTS // max(1, z.shape[1]))


def row_slices(z: Tensor, split: bool) -> Iterator[slice]:
    """Rows of a chunk (C, V): in blocks that fit the cache if ``split``, else all of them."""
    rows = z.shape[0]
    size = _block_rows(z) if split else max(1, rows)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def cap_scratch(z: Tensor, head: Head) -> Tensor:
    """Room for the logits of one block of ``row_slices`` while its tanh stays; (0, V) uncapped."""
    size = _block_rows(z) if head.softcap > 0 else 0
    return z.new_empty((min(size, z.shape[0]), z.shape[1]))


def logits_of(product: Tensor, head: Head, scratch: Tensor) -> Tensor:
    """The logits of a block from its product: the same tensor, or with a softcap in ``scratch``."""
    if head.softcap == 0:
        return product
    return torch.mul(product, head.cap_scale, out=scratch[: product.shape[0]])


class Softmax(NamedTuple):
    """What is left of a block of logits (C, V) once it holds probabilities."""

    gap: Tensor  # (C, K) z_t - max
    log_sum: Tensor  # (C,) log sum e^(z - max)
    peak: Tensor  # (C,) max
    argmax: Tensor | None  # (C,)

    @property
    def logp(self) -> Tensor:
        """log p(target), (C, K): never through an LSE rounded at the logits' own magnitude."""
        return self.gap - self.log_sum[:, None]

    @property
    def lse(self) -> Tensor:
        """log sum e^z, (C,)."""
        return self.peak + self.log_sum


def softmax_in_place(z: Tensor, target: Tensor, argmax: bool = False) -> Softmax:
    """Turn logits (C, V) into probabilities in place; ``target`` (C, K).

    The largest probability is e^0 over the sum, so the sum comes back without a second
    exponential, and neither term of log p sees the offset of the logits nor an underflow of p_t.
    """
    peak, index = z.max(1) if argmax else (z.amax(1), None)
    gap = z.gather(1, target) - peak[:, None]
    if z.device.type == "cpu":
        _softmax_out(z, 1, False, out=z)  # one pass a row, each row read before it is written
    else:
        z.sub_(peak[:, None]).exp_()
        z.div_(z.sum(1, keepdim=True))
    return Softmax(gap, z.amax(1).log_().neg_(), peak, index)


class ClassSums:
    """Sums over all classes: ``sum_c w_c z_c`` of a row, and ``sum_c w_c``.

    Without a softcap the logits are linear in x, so a row's sum is its product with ``W^T w`` (d,):
    no pass over (C, V). It is formed in float64, because a large common offset of the logits must
    cancel against the LSE's.
    """

    def __init__(self, head: Head, weight: Tensor | None) -> None:
        self.head = head
        self.weight = None if weight is None else weight.to(head.acc)  # (V,), all ones if None
        classes, width = head.weight.shape
        self.total: float | Tensor = float(classes) if weight is None else weight.double().sum()
        if head.softcap > 0:
            return
        self.columns = torch.zeros(width, dtype=torch.float64, device=head.weight.device)
        for start, stop, block in head.weight_blocks(True):
            wide = block.double()
            part = wide.sum(0) if weight is None else wide.t() @ weight[start:stop].double()
            self.columns += part
        self.constant: float | Tensor = 0.0
        if head.bias is not None:
            bias = head.bias.double()
            if weight is not None:  # a banned class (bias -inf) of weight 0 adds nothing
                bias = torch.where(weight == 0, 0.0, bias * weight.double())
            self.constant = bias.sum()

    def of_rows(self, x: Tensor) -> Tensor:
        """``sum_c w_c z_c`` (C,) float64 from ``x`` (C, d), where there is no softcap."""
        return (x.double() @ self.columns + self.constant) * self.head.gradient_scale

    def of_logits(self, z: Tensor) -> Tensor:
        """``sum_c w_c z_c`` (C,) float64 from logits (C, V), which a softcap has bounded."""
        if self.weight is None:
            return z.sum(1).double()
        # An output of its own: autocast would round a plain product.
        return torch.mv(z, self.weight, out=z.new_empty(z.shape[0])).double()

    def weighted_nll(self, soft: Softmax, sums: Tensor) -> Tensor:
        """``sum_c w_c (-log p_c)`` (C,) in acc dtype from ``sums``, the rows' ``sum_c w_c z_c``."""
        offset = soft.peak.double() * self.total - sums
        return (offset + soft.log_sum.double() * self.total).to(soft.peak.dtype)
