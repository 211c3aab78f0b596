"""Bytes of a streamed training step on the CPU, part by part, at every moment that can be its peak.

A pure function of sizes. Each moment lists what is allocated then, the way ``varstream.streaming``
and ``varstream.reference`` do it: ``n`` tokens, ``es`` bytes an element, ``a`` bytes in the
accumulation dtype. Weights and optimizer states are not a step's and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from varstream.planner.shapes import LayerGradients, ModelShape
from varstream.reference import attention, head

# The parts, in the order in which they are shown.
WEIGHTS, STATES, GRADIENTS = "weights", "optimizer states", "gradients"
INPUTS, TABLES = "layer inputs", "rotary tables, positions"
RETURNED = "padded hidden states"  # of a backbone called alone
FLOW, KV, DKV = "layer output, dX", "K, V of a layer", "dK, dV of a layer"
CHUNK, TILES = "chunk activations", "attention temporaries"
SUMS, FOUND = "layer gradient sums", "chunk's parameter gradients"
HIDDEN, HEAD_DX, HEAD_DW = "head input", "head dX", "head dW"
LOGITS, HEAD_TEMPORARIES = "head chunk", "head temporaries"
OPTIMIZER = "optimizer temporaries"

_POSITION = 8  # an int64
_SMALL = 4096  # the loss, where chunks begin
_NORM = 4  # Hugging Face's norms compute in float32 whatever the dtype
_FLASH_Q, _FLASH_K = 256, 512  # blocks of ATen's CPU flash kernel


class Moment(NamedTuple):
    """A moment of the step and the bytes of every part that exists then."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Step:
    """What a step runs on; ``accumulate``: gradients of an earlier backward exist already."""

    tokens: int  # n
    longest: int  # longest document
    threads: int = 1
    accumulate: bool = False
    reverse: bool = False  # chunks run last to first
    padded: int = 0  # positions of the padded batch (B * S), 0 where rows come packed


def head_moments(m: ModelShape, step: Step, chunk: int) -> list[Moment]:
    """The head, in whose forward the gradients are formed; ``chunk`` rows of logits at a time.

    The rows with a label may be fewer than the tokens, so the chunk counts as full.
    """
    if not m.vocab:
        return []
    n, d, rows = step.tokens, m.hidden, min(chunk, step.tokens)
    es, a = m.itemsize, m.acc
    kept = _kept(m, step, len(m.layers))
    kept[TABLES] += 3 * n * _POSITION  # positions, targets, the rows with a label
    kept[GRADIENTS] = 0
    dx = n * d * es if m.first <= len(m.layers) else 0
    temporaries = rows * 4 * a
    if es != a:  # x, dX and a block of the weight, widened
        block = max(head._MIN_WEIGHT_ROWS, head._WEIGHT_ELEMENTS // d)
        temporaries += 2 * rows * d * a + min(m.vocab, 2 * block) * d * a  # and the one before
    moments = [
        Moment(
            "head",
            kept
            | {
                HIDDEN: n * d * es,
                HEAD_DX: dx,
                HEAD_DW: m.head * a,
                LOGITS: rows * m.vocab * a,
                HEAD_TEMPORARIES: temporaries,
            },
        )
    ]
    if es != a:
        cast = {HEAD_DX: dx, HEAD_DW: m.head * (a + es)}
        moments.append(Moment("head gradient in the weights' dtype", kept | cast))
    return moments


def layer_moments(m: ModelShape, step: Step, chunk: int) -> list[Moment]:
    """Forward and backward of the layers and the final norm, ``chunk`` rows at a time."""
    moments = [_packing(step), _norm_backward(m, step, chunk), _forward(m, step, chunk)]
    for index in _extremes(m):
        moments += _layer_backward(m, step, chunk, index)
    return moments


def last_moments(m: ModelShape, step: Step) -> list[Moment]:
    """The embedding's gradient, when all the others exist; a tied one joins the head's."""
    if not m.embedding:
        return []
    flow = {FLOW: step.tokens * m.hidden * m.itemsize}
    gradients = m.embedding + m.head if step.accumulate else m.trained + m.tied * m.embedding
    kept = {
        TABLES: _tables(m, step),
        RETURNED: _returned(m, step),
        GRADIENTS: gradients * m.itemsize,
    }
    return [Moment("embedding gradient", kept | flow)]


def optimizer_moment(m: ModelShape, optimizer: str) -> Moment:
    """``optimizer.step()``: gradients, and torch's temporaries for one parameter at a time."""
    size = m.itemsize
    temporaries = {"adamw": 2 * m.largest * size, "sgd": 0, "none": 0}[optimizer]
    return Moment("optimizer step", {GRADIENTS: m.trained * size, OPTIMIZER: temporaries})


# --- what a layer keeps ---------------------------------------------------------------------------


def _tables(m: ModelShape, step: Step) -> int:
    """Cosines, sines, row numbers, where documents begin; of a padded batch the places and
    positions of its real tokens."""
    numbers = 1 + 2 * (step.padded > 0)
    starts = -(-step.tokens // step.longest) * _POSITION
    return step.tokens * (2 * m.head_dim * m.itemsize + numbers * _POSITION) + starts + _SMALL


def _returned(m: ModelShape, step: Step) -> int:
    """A backbone called alone gives its caller (B, S, d)."""
    return 0 if m.vocab else step.padded * m.hidden * m.itemsize


def _kept(m: ModelShape, step: Step, index: int) -> dict[str, int]:
    """What the graph holds while layer ``index`` is the last one with an input to keep."""
    inputs = max(0, index - m.first + 1)
    return {
        INPUTS: inputs * step.tokens * m.hidden * m.itemsize,
        TABLES: _tables(m, step),
        RETURNED: _returned(m, step),
        GRADIENTS: _finished(m, step, index) * m.itemsize,
    }


def _finished(m: ModelShape, step: Step, index: int) -> int:
    """Elements of the gradients that exist when the backward reaches layer ``index``.

    While gradients are accumulated each new one is added to the old one at once.
    """
    above = len(m.layers)
    if step.accumulate or index > above:
        return m.head if m.tied else 0
    return m.head + (m.norm if index < above else 0) + sum(g.all for g in m.layers[index + 1 :])


def _extremes(m: ModelShape) -> list[int]:
    """Layers that can hold the peak: in a run of like layers memory falls or rises steadily."""
    alike = [i for i in range(m.first, len(m.layers))]
    return [
        i
        for i in alike
        if i in (alike[0], alike[-1])
        or m.layers[i] != m.layers[i - 1]
        or m.layers[i] != m.layers[i + 1]
    ]


# --- moments of a layer ---------------------------------------------------------------------------


def _packing(step: Step) -> Moment:
    """Finding the real tokens of a padded batch: masks and a table of places."""
    return Moment("packing", {TABLES: step.padded * (2 + _POSITION) + _SMALL})


def _norm_backward(m: ModelShape, step: Step, chunk: int) -> Moment:
    rows, es = min(chunk, step.tokens), m.itemsize
    flow = (1 + (m.first < len(m.layers))) * step.tokens * m.hidden * es
    kept = _kept(m, step, len(m.layers))
    kept[RETURNED] *= 2  # and their gradient
    return Moment("final norm", kept | {FLOW: flow, CHUNK: rows * m.hidden * (_norm_work(m) + es)})


def _forward(m: ModelShape, step: Step, chunk: int) -> Moment:
    """The last layer's forward, without a graph: what it keeps, its output, K, V and a chunk."""
    n, rows, es = step.tokens, min(chunk, step.tokens), m.itemsize
    last = len(m.layers) - 1
    parts = _kept(m, step, last) | {GRADIENTS: 0}
    borrowed = 0 if m.first <= last else 1  # an input nobody keeps
    return Moment(
        "forward",
        parts
        | {
            FLOW: (1 + borrowed) * n * m.hidden * es,
            KV: 2 * n * m.kv_width * es,
            CHUNK: rows * (3 * m.intermediate + 4 * m.hidden) * es,
        },
    )


def _layer_backward(m: ModelShape, step: Step, chunk: int, index: int) -> list[Moment]:
    """The moments of the first chunk, of the largest later one, which meets the sums of those
    before it, and of K and V."""
    n, es, a, g = step.tokens, m.itemsize, m.acc, m.layers[index]
    dx = index > m.first or m.embedding > 0 or m.input_gradient
    base = _kept(m, step, index) | {
        FLOW: (1 + dx) * n * m.hidden * es,
        KV: 2 * n * m.kv_width * es,
        DKV: 2 * n * m.kv_width * a,
    }
    rows, later = min(chunk, n), min(chunk, n - chunk)
    begin, inside = [(min(rows, step.longest), 0)], _later_spans(step, chunk, later)
    if step.reverse:
        begin = inside = begin + inside
    moments = _chunk_backward(m, g, base, rows, _tiles(m, step, begin))
    if later > 0:
        grown = base | {SUMS: g.rest * a}
        largest = rows if step.reverse else later
        moments += _chunk_backward(m, g, grown, largest, _tiles(m, step, inside))
    sums = g.rest if later <= 0 else g.all
    kv = m.hidden * _norm_work(m) + 2 * m.kv_width * es * (1 if es == a else 2)
    y = rows * m.hidden * es
    moments += [
        _moment("gradient sums", base | {SUMS: g.rest * a}, y, g.rest * es),
        _moment("K and V", base | {SUMS: sums * a}, rows * kv, g.kv * es),
    ]
    if es != a:
        cast = {SUMS: g.all * (a + es)}
        moments.append(Moment("gradients in the weights' dtype", base | cast))
    return [moment._replace(name=f"backward of layer {index}: {moment.name}") for moment in moments]


def _chunk_backward(
    m: ModelShape, g: LayerGradients, base: dict[str, int], rows: int, tiles: int
) -> list[Moment]:
    """One chunk: MLP, second norm, attention, first norm. Parameter gradients pile up on the way;
    y lives to the end, and a residual's gradient while its branch runs back."""
    es, before = m.itemsize, _before_mlp(m)
    d, q, f = m.hidden * es, m.q_width * es, m.intermediate * es
    mlp = before + _norm_saved(m) + 2 * d + 6 * f
    norm = before + 2 * d + m.hidden * _norm_work(m)
    attend = before + 2 * d + q + m.q_width * m.acc
    end = 2 * d + m.hidden * _norm_work(m)
    found = g.down + g.gate_up
    return [
        _moment("MLP", base, rows * mlp, g.down * es),
        _moment("MLP's norm", base, rows * norm, found * es),
        _moment("attention", base | {TILES: tiles}, rows * attend, (found + g.attention // 2) * es),
        _moment("end of a chunk", base, rows * end, g.rest * es),
    ]


def _moment(name: str, base: dict[str, int], chunk: int, found: int) -> Moment:
    return Moment(name, base | {CHUNK: chunk, FOUND: found})


# --- bytes a row of a chunk -----------------------------------------------------------------------


def _norm_saved(m: ModelShape) -> int:
    """A norm's normalised rows and its output, one factor, and the float32 copy of its input."""
    return m.hidden * (2 * m.itemsize + (0 if m.itemsize == _NORM else _NORM)) + _NORM


def _norm_work(m: ModelShape) -> int:
    """A norm's backward, bytes an element: float32 temporaries, and casts outside float32."""
    return 5 * _NORM + (0 if m.itemsize == _NORM else 2 * _NORM)


def _before_mlp(m: ModelShape) -> int:
    """What the graph holds of the attention half: first norm, rotary rows, q, out, LSE."""
    es = m.itemsize
    q = m.q_width * es
    if m.qk_norm:  # q before the norm (in float32) and normalised
        q += m.q_width * (es + _NORM) + m.heads * _NORM
    return _norm_saved(m) + 2 * m.head_dim * es + q + m.q_width * es + m.heads * m.acc


# --- attention of a chunk -------------------------------------------------------------------------

Span = tuple[int, int]  # rows of a chunk in one document, the document's keys before them


def _later_spans(step: Step, chunk: int, rows: int) -> list[Span]:
    """Spans of the chunks after the first that can be the largest; no chunk has more than
    ``rows``."""
    keys = step.longest
    if rows <= 0:
        return []
    if keys == step.tokens:  # one document: the last chunk, and the last full one
        begin = (keys - 1) // chunk * chunk
        return [(keys - begin, begin)] + ([(chunk, begin - chunk)] if begin > chunk else [])
    # Chunk edges fall anywhere: the worst split of the longest document. In strips, or whole at
    # the corners of what is linear piece by piece in the rows.
    rows = min(rows, keys)
    whole, tile = min(rows, keys // 2), attention.FLASH_KEYS
    corners = {whole, keys - tile, keys - tile - 1, keys - 2 * tile}
    strips = (rows, min(rows - 1, keys - rows))
    return [strips, *((r, keys - r) for r in sorted(corners) if 0 < r <= whole)]


def _tiles(m: ModelShape, step: Step, spans: list[Span]) -> int:
    """The attention backward's tiles: dq, dk, dv of one and of the one before, and workspace."""
    pieces = [0]
    for rows, before in spans:
        border = min(rows, attention.FLASH_BORDER_ROWS)
        if m.full_attention and before >= rows:
            pieces.append(_pair(m, rows, before, border))
        elif m.full_attention:  # in strips while fewer keys precede the rows than there are rows
            pieces.append(_pair(m, max(border, rows // 4), before + rows - border, border))
        if m.window is not None:
            pieces.append(_pair(m, border, min(m.window, rows + before), border))
            pieces.append(_edge(m, border))
    block = min(_FLASH_Q, step.longest) * min(_FLASH_K, step.longest)
    copies = 2 * m.acc + (2 * m.itemsize if m.itemsize < m.acc else 0)
    return max(pieces) + step.threads * block * copies


def _pair(m: ModelShape, rows: int, keys: int, border: int) -> int:
    """Two tiles in a row: ``rows`` queries on at most FLASH_KEYS keys each, else one of them and a
    border tile."""
    first = min(keys, attention.FLASH_KEYS)
    second = min(keys - first, attention.FLASH_KEYS)
    q = rows + (rows if second else border)
    return (q * m.q_width + 2 * (first + max(second, border)) * m.kv_width) * m.itemsize


def _edge(m: ModelShape, rows: int) -> int:
    """A tile that a window's border runs through: three blocks of its scores, rows of dout, dq."""
    assert m.window is not None
    keys = rows + (m.window if m.window < rows else 0)
    return (3 * m.heads * keys + 2 * m.q_width) * rows * m.acc
