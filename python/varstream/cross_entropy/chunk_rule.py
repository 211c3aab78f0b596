"""How many rows a chunk of the head has on a GPU, from a model of its three matrix products.

A chunk of C rows, hidden size d, V classes, forms

    Z (C, V) = X W^T,    dX (C, d) = G W,    dW (V, d) += G^T X,

2 C V d operations each. The first two read W once, the third reads and writes dW in float32: the
smaller C, the more of the time goes into that traffic. The second has few output tiles, which come
in waves of one a multiprocessor, the last of them partly idle. Both are modelled, everything else
is the same for every C. The constants are those of an H100; only their ratios count.
"""

from __future__ import annotations

PEAK = 800e12  # operations a second that a large bfloat16 product reaches
BANDWIDTH = 3.0e12  # bytes a second
PROCESSORS = 132
TILE = (128, 256)  # rows and columns of an output tile
LAUNCH = 10e-6  # seconds a chunk costs besides

STEP = 128  # rows; a tile's
MOST = 4096  # rows: beyond it nothing is gained
BUDGET = 1 << 30  # bytes of a chunk's logits
PADDING = 64  # logits: a row of the buffer takes a multiple of them


def chunk_seconds(rows: int, width: int, classes: int, itemsize: int = 4) -> float:
    """Modelled time of a chunk's three products; ``itemsize`` bytes a logit."""
    work = 2 * rows * width * classes / PEAK
    weight, logits = width * classes, rows * classes
    traffic = (
        2 * weight + itemsize * logits,  # W read, Z written
        2 * weight + 2 * logits,  # W and G read
        8 * weight + 2 * logits,  # dW read and written, G read
    )
    tiles = -(-rows // TILE[0]) * -(-width // TILE[1])
    waves = -(-tiles // PROCESSORS)
    idle = 1.0  # up to a wave of tiles, which split V instead
    if tiles > PROCESSORS:
        idle = waves * PROCESSORS * TILE[0] * TILE[1] / (rows * width)
    times = (work, work * idle, work)
    return LAUNCH + sum(max(t, b / BANDWIDTH) for t, b in zip(times, traffic, strict=True))


def call_seconds(rows: int, chunk: int, width: int, classes: int, itemsize: int = 4) -> float:
    """Modelled time of all chunks of a call, cut as evenly as ``DeviceRows.chunks`` does."""
    pieces = -(-rows // chunk)
    return pieces * chunk_seconds(-(-rows // pieces), width, classes, itemsize)


def chunk_rows(rows: int, width: int, classes: int, itemsize: int = 4, budget: int = BUDGET) -> int:
    """Rows of a chunk: the fastest by the model whose logits stay within ``budget`` bytes.

    A multiple of 128 and at most 4096; of choices within 1 % of the fastest the smallest: 2048 or
    more where memory allows, fewer at widths whose waves they fill better. Where not even 128 rows
    fit, as many as do, at least 1.
    """
    columns = -(-classes // PADDING) * PADDING
    most = min(MOST, budget // (columns * itemsize))
    if most < STEP:
        return max(1, most)
    if rows <= STEP:
        return STEP
    choices = range(STEP, min(most, -(-rows // STEP) * STEP) + 1, STEP)
    times = {c: call_seconds(rows, c, width, classes, itemsize) for c in choices}
    limit = 1.01 * min(times.values())
    return next(c for c in choices if times[c] <= limit)
