"""The roofline knee: the fewest rows a chunk should have to keep its device busy.

Every chunk reads the layer's weights again and, where they are trained, adds their gradients into
sums; with fewer rows than the knee that traffic, not the arithmetic, sets the time, and shorter
chunks cost time for little memory.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import NamedTuple

from varstream.planner.devices import Device

_SLACK = 0.25  # how much slower than with endless chunks is still at the knee
_TILE_ROWS = 128  # queries of a block of the attention kernel (csrc/attention/forward_traits.h)
_warned: set[str] = set()


class Product(NamedTuple):
    """A matrix (k, m) that rows of a chunk are multiplied with."""

    inner: int  # k
    outer: int  # m
    itemsize: int  # bytes of an element
    trained: bool
    share: float = 1.0  # of the chunk's rows that meet it: of one expert, experts a row / experts

    @property
    def weight_bytes(self) -> int:
        """Moved by a chunk for each element: two readings and, where it is trained, the gradient
        written, read and added into float32 sums."""
        return 2 * self.itemsize + (2 * self.itemsize + 8 if self.trained else 0)


def product_knee(product: Product, device: Device) -> int:
    """Rows of a chunk from which a product's time a row is within a quarter of its limit.

    With ``c`` rows, recomputation, input gradient and, where trained, weight gradient (p = 2 or 3
    products) take 2 p c k m operations and move ``p c (k + m)`` elements of rows. Besides, a chunk
    moves ``w`` bytes an element of the weight (``Product.weight_bytes``). Time a row is the larger
    of

        2 p k m / peak    and    (p (k + m) itemsize + w k m / c) / bandwidth,

    whose limit for long chunks the second must not pass by more than a quarter.

    Source: the roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009).
    """
    k, m, size = product.inner, product.outer, product.itemsize
    products = 3 if product.trained else 2
    rows_bytes = products * (k + m) * size
    limit = max(2 * products * k * m / device.balance, rows_bytes)  # of the bytes a row
    rows = k * m * product.weight_bytes / ((1 + _SLACK) * limit - rows_bytes)
    return math.ceil(rows / product.share)


def attention_knee(heads: int, device: Device) -> int:
    """Rows whose blocks of 128 queries, for each head, give every multiprocessor one."""
    return _TILE_ROWS * -(-device.processors // heads) if device.cuda else 1


@lru_cache(maxsize=256)
def knee(products: tuple[Product, ...], heads: int, device: Device) -> int:
    """Rows a chunk of a layer should have; its products' smallest dimensions ask for the most.

    Matrices that stay in the cache from chunk to chunk, with their gradients, ask for none.
    """
    moved = sum(p.inner * p.outer * p.weight_bytes / p.share for p in products)
    of_products = [product_knee(p, device) for p in products] if moved > device.cache else []
    return max(1, attention_knee(heads, device), *of_products)


def words_below(chunk: int, rows: int, tokens: int, device: Device) -> str:
    """What is said of a chunk below the knee; "" of one that isn't, or that holds all tokens."""
    if chunk >= min(rows, tokens):
        return ""
    return (
        f"Chunks of {chunk:,} rows are below the roofline knee of about {rows:,} rows "
        f"({device.name}): moving weights and gradients, not arithmetic, sets the time."
    )


def warn_once(words: str) -> None:
    """A UserWarning, once in a process for each text; none for ""."""
    if words and words not in _warned:
        _warned.add(words)
        warnings.warn(words, UserWarning, stacklevel=3)
