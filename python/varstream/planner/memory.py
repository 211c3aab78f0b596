"""Bytes of a streamed training step, part by part, at every moment that can be its peak.

A pure function of sizes. What a layer allocates was traced (``planner.trace``); around it each
moment lists what is kept: ``n`` tokens, ``es`` bytes an element, ``a`` bytes in the accumulation
dtype. Weights and optimizer states are not a step's and are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from varstream.planner.attention_memory import (
    Composed,
    cuda_backward,
    cuda_forward,
    spans,
)
from varstream.planner.devices import CPU, Device
from varstream.planner.head_memory import head_parts, weight_gradient
from varstream.planner.shapes import LayerShape, ModelShape
from varstream.planner.trace import ATTENTION, ATTENTION_BACKWARD, AttentionShape, Line

# The parts, in the order in which they are shown.
WEIGHTS, STATES, GRADIENTS = "weights", "optimizer states", "gradients"
INPUTS, TABLES = "layer inputs", "rotary tables, positions"
ROUTERS = "router logits"
RETURNED = "padded hidden states"  # of a backbone called alone
FLOW, KV, DKV = "layer output, dX", "K, V of a layer", "dK, dV of a layer"
CHUNK, TILES, SUMS = "chunk activations", "attention temporaries", "gradients of a layer"
HIDDEN, HEAD_DX, HEAD_DW = "head input", "head dX", "head dW"
LOGITS, HEAD_TEMPORARIES = "head chunk", "head temporaries"
OPTIMIZER = "optimizer temporaries"
CONTEXT, FRAGMENTATION = "CUDA context, workspaces", "fragmentation"

_POSITION = 8  # an int64
_SMALL = 49152  # the loss, where chunks begin, odds and ends
_RANDOM_STATE = 5056  # of torch's CPU generator, kept on the host for each chunk of each layer


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
    padded: int = 0  # positions of the padded batch (B * S), 0 where rows come packed
    device: Device = CPU


def head_moments(m: ModelShape, step: Step, chunk: int, layer_chunk: int) -> list[Moment]:
    """The head, in whose forward the gradients are formed; ``chunk`` rows of logits at a time."""
    if m.head is None:
        return []
    n, d, es, a = step.tokens, m.hidden, m.itemsize, m.acc
    kept = _kept(m, step, len(m.layers), layer_chunk)
    kept[TABLES] += 3 * n * _POSITION  # positions, targets, the rows with a label
    kept[GRADIENTS] = 0
    parts = head_parts(m, n, chunk, step.device)
    dx = n * (d + m.head.rank) * es if m.first <= len(m.layers) else 0
    dw = weight_gradient(m)
    formed = {
        HIDDEN: n * d * es,
        HEAD_DX: dx,
        HEAD_DW: dw * a,
        LOGITS: parts["logits"],
        HEAD_TEMPORARIES: parts["around"],
    }
    moments = [Moment("head", kept | formed)]
    if m.router_bytes:  # logits and probabilities, while the head's gradients wait
        both = {ROUTERS: 2 * kept[ROUTERS], HEAD_DX: dx, HEAD_DW: dw * es}
        moments.append(Moment("router losses", kept | both))
    if es != a:
        cast = {HEAD_DX: dx, HEAD_DW: dw * (a + es)}
        moments.append(Moment("head gradient in the weights' dtype", kept | cast))
    return moments


def layer_moments(m: ModelShape, step: Step, chunk: int) -> list[Moment]:
    """Forward and backward of the layers and the final norm, ``chunk`` rows at a time."""
    moments = [_packing(step)]
    if m.norm is not None:
        moments += _backward(m, step, chunk, len(m.layers), m.norm, "final norm")
    moments += _forward(m, step, chunk)
    for index in _extremes(m):
        moments += _backward(m, step, chunk, index, m.layers[index], f"layer {index}")
    return moments


def last_moments(m: ModelShape, step: Step, chunk: int) -> list[Moment]:
    """The embedding's gradient, when all the others exist; a tied one joins the head's."""
    if not m.embedding.elements:
        return []
    flow = {FLOW: step.tokens * m.hidden * m.itemsize}
    gradients = m.embedding.bytes + m.head_trained.bytes
    if not step.accumulate:
        gradients = m.trained.bytes + m.tied * m.embedding.bytes
    kept = {
        TABLES: _tables(m, step, chunk),
        RETURNED: _returned(m, step),
        GRADIENTS: gradients,
    }
    return [Moment("embedding gradient", kept | flow)]


def optimizer_moment(m: ModelShape, optimizer: str, itemsize: int | None = None) -> Moment:
    """``optimizer.step()``: gradients, and torch's temporaries for one parameter at a time;
    ``itemsize``: bytes of a state's element, the parameter's if None."""
    largest = m.largest.bytes if itemsize is None else m.largest.elements * itemsize
    temporaries = {"adamw": 2 * largest, "sgd": 0, "none": 0}[optimizer]
    return Moment("optimizer step", {GRADIENTS: m.trained.bytes, OPTIMIZER: temporaries})


# --- what a layer keeps ---------------------------------------------------------------------------


def _tables(m: ModelShape, step: Step, chunk: int) -> int:
    """Rotary tables and positions, where documents begin; of a padded batch the places and
    positions of its real tokens; on the CPU a random state for each chunk of each layer."""
    numbers = 1 + 2 * (step.padded > 0)
    starts = -(-step.tokens // step.longest) * _POSITION
    states = 0 if step.device.cuda else (len(m.layers) + 2) * -(-step.tokens // chunk)
    rows = math.ceil(step.tokens * (m.row_bytes + numbers * _POSITION))
    return rows + starts + states * _RANDOM_STATE + _SMALL


def _returned(m: ModelShape, step: Step) -> int:
    """A backbone called alone gives its caller (B, S, d)."""
    return 0 if m.vocab else step.padded * m.hidden * m.itemsize


def _kept(m: ModelShape, step: Step, index: int, chunk: int) -> dict[str, int]:
    """What the graph holds while layer ``index`` is the last one with an input to keep."""
    inputs = max(0, index - m.first + 1)
    if _looks_up(m) and inputs:
        inputs -= 1
    return {
        INPUTS: inputs * step.tokens * m.hidden * m.itemsize,
        TABLES: _tables(m, step, chunk),
        ROUTERS: _routers(m, step, index + 1),  # the gradients of their logits
        RETURNED: _returned(m, step),
        GRADIENTS: _finished(m, step, index),
    }


def _looks_up(m: ModelShape) -> bool:
    """Whether the first layer's input is looked up again, a chunk at a time, and so not kept."""
    return m.looks_up and m.first == 0 and not m.input_gradient


def _routers(m: ModelShape, step: Step, layers: int) -> int:
    """Logits of the first so many layers' routers; at most all of them."""
    count = max(1, len(m.layers))
    return math.ceil(step.tokens * m.router_bytes * min(layers, count) / count)


def _finished(m: ModelShape, step: Step, index: int) -> int:
    """Bytes of the gradients that exist when the backward reaches layer ``index``.

    While gradients are accumulated each new one is added to the old one at once.
    """
    above, head = len(m.layers), m.head_trained.bytes
    if step.accumulate or index > above:
        return head if m.tied else 0
    norm = m.norm_trained.bytes if index < above else 0
    return head + norm + sum(layer.trained.bytes for layer in m.layers[index + 1 :])


def _extremes(m: ModelShape) -> list[int]:
    """Layers that can hold the peak: in a run of like layers memory falls or rises steadily."""
    alike = range(m.first, len(m.layers))
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


def _forward(m: ModelShape, step: Step, chunk: int) -> list[Moment]:
    """The last layer's forward, without a graph: what it keeps, its output, K, V and a chunk."""
    last = len(m.layers) - 1
    kept = _kept(m, step, last, chunk) | {GRADIENTS: 0}
    borrowed = m.first > last or (last == 0 and _looks_up(m))  # an input nobody keeps
    kept[FLOW] = borrowed * step.tokens * m.hidden * m.itemsize
    n, rows = step.tokens, min(chunk, step.tokens)
    moments = []
    for layer in dict.fromkeys(m.layers):
        shape = layer.trace.attention
        for line in layer.trace.forward:
            parts = _parts(m, step, line, n, rows, shape, buffers=1)
            moments.append(Moment("forward", _joined(kept, parts)))
    return moments


def _backward(
    m: ModelShape, step: Step, chunk: int, index: int, layer: LayerShape, name: str
) -> list[Moment]:
    """The backward of one layer: of its only chunk, or of the largest that meets the sums of those
    before it. dX is written over the dY that the layer above gave, unless logits go out too."""
    n, rows = step.tokens, min(chunk, step.tokens)
    if index < m.first:
        return []
    base = _kept(m, step, index, chunk)
    dx = n * m.hidden * m.itemsize
    if layer is m.norm:
        base[RETURNED] *= 2  # and their gradient
    top = len(m.layers) - (m.norm is None)
    over = index < top and not m.router_bytes
    needs_dx = index > m.first or m.embedding.elements > 0 or m.input_gradient
    lines = layer.trace.later if n > chunk else layer.trace.single
    moments = []
    for line in lines:
        parts = _parts(m, step, line, n, rows, layer.trace.attention, buffers=2)
        parts[FLOW] = dx if over or not needs_dx else 2 * dx
        if index == 0 and _looks_up(m):
            parts[CHUNK] += rows * m.hidden * m.itemsize  # a view of the kept input elsewhere
        moments.append(Moment(f"backward of {name}: {line.name}", _joined(base, parts)))
    return moments


def _parts(
    m: ModelShape,
    step: Step,
    line: Line,
    n: int,
    rows: int,
    attention: AttentionShape | None,
    buffers: int,
) -> dict[str, int]:
    """A traced moment by parts; ``buffers``: 1 for K and V, 2 for their gradients as well."""
    left = math.ceil(line.row * n + line.chunk_row * rows)
    constant = math.ceil(line.constant)
    kv = 0 if attention is None else n * attention.kv_width
    wanted = {
        KV: kv * m.itemsize,
        DKV: kv * m.acc if buffers == 2 else 0,
        FLOW: n * m.hidden * m.itemsize,
    }
    if constant < _SMALL:
        left, constant = left + constant, 0
    parts = {SUMS: constant}
    for name, size in wanted.items():
        parts[name] = min(left, size)
        left -= parts[name]
    parts[CHUNK] = left
    parts[TILES] = _attention(m, step, line, rows, attention)
    return parts


def _attention(
    m: ModelShape, step: Step, line: Line, rows: int, shape: AttentionShape | None
) -> int:
    """What attention allocates inside its operator at a moment that is one."""
    if shape is None or line.name not in (ATTENTION, ATTENTION_BACKWARD):
        return 0
    backward = line.name == ATTENTION_BACKWARD
    if step.device.cuda and m.itemsize == 2:
        return (cuda_backward if backward else cuda_forward)(shape, rows)
    composed = Composed(shape, m.itemsize, step.threads, flash=not step.device.cuda)
    found = spans(step.tokens, step.longest, rows)
    return (composed.backward if backward else composed.forward)(rows, found)


def _joined(kept: dict[str, int], parts: dict[str, int]) -> dict[str, int]:
    return kept | {name: kept.get(name, 0) + size for name, size in parts.items()}
