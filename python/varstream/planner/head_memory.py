"""The head's moments: its loss is formed chunk by chunk together with the gradients."""

from __future__ import annotations

from varstream.cross_entropy.chunk_rule import PADDING, chunk_rows
from varstream.planner.devices import Device
from varstream.planner.shapes import ModelShape
from varstream.reference import head

_INDEX = 8  # an int64
_MANY = 1 << 20  # rows: the rule's choice for a long call


def automatic_chunk(m: ModelShape, device: Device) -> int:
    """Rows of a chunk of logits where nobody names them."""
    if device.cuda and m.itemsize < 8:
        return chunk_rows(_MANY, m.hidden, max(1, m.vocab), 4)
    return head.auto_chunk_size(max(1, m.vocab), m.acc, "cuda" if device.cuda else "cpu")


def head_parts(m: ModelShape, tokens: int, rows: int, device: Device) -> dict[str, int]:
    """Logits of a chunk of rows and what is formed around them.

    The rows with a label may be fewer than the tokens, so the chunk counts as full.
    """
    assert m.head is not None
    d, es, a = m.hidden + m.head.rank, m.itemsize, m.acc
    rows = min(rows, tokens)
    if device.cuda and es < 8:
        # Logits padded to whole cache lines; a chunk's x and dX; the order of the rows, twice, and
        # what each row yields.
        logits = rows * -(-m.vocab // PADDING) * PADDING * 4
        around = 2 * rows * d * es + tokens * (3 * _INDEX + 3 * 4)
    else:
        logits = rows * m.vocab * a
        around = rows * 4 * a
        block = max(head._MIN_WEIGHT_ROWS, head._WEIGHT_ELEMENTS // d)
        if es != a:  # x, dX and a block of the weight, widened, and the block before
            around += 2 * rows * d * a + min(m.vocab, 2 * block) * d * a
        if m.head.softcap:
            around += min(rows * m.vocab, head._BLOCK_ELEMENTS) * 2 * a
    if m.head.rank:  # hidden states and weight with the adapter's columns beside their own
        around += (tokens * d + m.vocab * d) * es
    return {"logits": logits, "around": around}


def weight_gradient(m: ModelShape) -> int:
    """Elements of the head's weight gradient while it is summed; an adapter's is formed with the
    whole weight's."""
    assert m.head is not None
    if not m.head.trained.elements:
        return 0
    return m.vocab * (m.hidden + m.head.rank) if m.head.rank else m.head.trained.elements
