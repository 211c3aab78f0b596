"""Embeddings of real texts: a MiniLM over the docstrings of Python's standard library, in batches
as they come, padding-free beside padded, length-sorted, nested and ONNX Runtime's ways."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .. import embedding_ways as ways
from .. import peers
from ..case import Bar, Case, Peer, Setup, Shape
from ..docstrings import docstrings

LONGEST = 256  # tokens of a text, what the model's own sentence_bert_config.json says
TEXTS = 256
QUICK = {"texts": 5, "batch": 2, "longest": 16}
FULL = {"texts": 64, "batch": 64, "longest": 128}
# Bytes that a padded token's activations take in a training step of the MiniLM.
STEP_BYTES = 210_000

NEEDS = peers.every(
    peers.transformers, peers.minilm, peers.attribute("varstream.encoder", "pooling")
)
FORWARD = (
    Peer("output_packed"),
    Peer("padded"),
    Peer("sorted"),
    Peer("nested"),
    Peer("onnx_padded", peers.onnxruntime),
    Peer("onnx_sorted", peers.onnxruntime),
)


def _texts(shape: Shape, seed: int, full: bool) -> ways.Texts:
    """``shape["texts"]`` docstrings; with ``full`` only long ones, cut to one length."""
    count, longest = shape["texts"], shape["longest"]
    tokens: tuple[tuple[int, ...], ...]
    if full:  # a token has a character or more
        long = [text for text in docstrings() if len(text) >= longest]
        tokens = tuple(t for t in ways.tokenized(long, longest) if len(t) == longest)[:count]
    else:
        tokens = ways.tokenized(docstrings()[:count], longest)
    assert len(tokens) == count, f"{len(tokens)} of {count} texts"
    width = ways.models()[0].config.hidden_size
    draw = torch.Generator().manual_seed(seed)
    return ways.Texts(tokens, shape["batch"], torch.randn(count, width, generator=draw))


def _fills(texts: ways.Texts) -> dict[str, float]:
    return {"fill": ways.fill(texts.unsorted), "fill/sorted": ways.fill(texts.by_length)}


def _build_forward(full: bool, shape: Shape, device: torch.device, seed: int) -> Setup:
    texts = _texts(shape, seed, full)
    given = {
        "varstream": (ways.padding_free, texts.unsorted),
        "output_packed": (ways.output_packed, texts.unsorted),
        "padded": (ways.padded, texts.unsorted),
        "sorted": (ways.padded, texts.by_length),
        "nested": (ways.nested, texts.unsorted),
        "onnx_padded": (ways.onnx, texts.unsorted),
        "onnx_sorted": (ways.onnx, texts.by_length),
    }
    return Setup(
        runs={name: partial(ways.forward, *way, texts) for name, way in given.items()},
        figures=lambda peaks, ours: _fills(texts),
    )


def _build_step(full: bool, shape: Shape, device: torch.device, seed: int) -> Setup:
    texts = _texts(shape, seed, full)
    padded, free = ways.models()
    given: dict[str, tuple[Any, ...]] = {
        "varstream": (free, ways.padding_free, texts.unsorted),
        "output_packed": (free, ways.output_packed, texts.unsorted),
        "padded": (padded, ways.padded, texts.unsorted),
        "sorted": (padded, ways.padded, texts.by_length),
        "accumulated": (padded, ways.padded, texts.micro),
    }
    return Setup(
        runs={name: partial(ways.step, *way, texts) for name, way in given.items()},
        results=dict.fromkeys(given, ways.compared),
        figures=lambda peaks, ours: _fills(texts),
    )


def _forward(batch: int, *bars: Bar) -> Case:
    texts = max(TEXTS, batch)
    return Case(
        f"embedding/forward_{batch}",
        "padding_free",
        {"texts": texts, "batch": batch, "longest": LONGEST},
        partial(_build_forward, False),
        QUICK,
        peers=FORWARD if texts > batch else tuple(map(_unsortable, FORWARD)),
        bars=bars,
        reference="padded",
        memory=False,
        slow=batch > TEXTS,
        needs=NEEDS,
        note="a MiniLM over docstrings as they come, without gradients; sorted: over all texts",
    )


def _unsortable(peer: Peer) -> Peer:
    """One batch holds all texts: sorted, it is the same work."""
    if "sorted" not in peer.name:
        return peer
    return Peer(peer.name, peers.never("one batch: nothing to sort"))


def _step(batch: int, *bars: Bar) -> Case:
    """Above 128 texts a padded step outgrows small machines: gradient accumulation is then the
    reference."""
    texts = max(TEXTS, batch)
    whole = peers.memory(batch * LONGEST * STEP_BYTES)
    if batch <= 2 * ways.MICRO:
        beside = (Peer("padded", whole), Peer("sorted", whole))
    else:
        sorted_ = Peer("sorted", whole)
        beside = (
            Peer("accumulated"),
            Peer("padded", whole),
            sorted_ if texts > batch else _unsortable(sorted_),
        )
    return Case(
        f"embedding/step_{batch}",
        "padding_free",
        {"texts": texts, "batch": batch, "longest": LONGEST},
        partial(_build_step, False),
        QUICK,
        peers=(Peer("output_packed"), *beside),
        bars=bars,
        reference=beside[0].name,
        slow=True,
        needs=NEEDS,
        note="forward and backward of a MiniLM over docstrings; sorted: over all texts",
    )


def _full(name: str, build: Any, beside: tuple[Peer, ...], memory: bool) -> Case:
    return Case(
        f"embedding/full_{name}",
        "padding_free",
        FULL,
        partial(build, True),
        {**QUICK, "texts": 4},
        peers=beside,
        bars=(Bar("time/padded", 1.05),),
        reference="padded",
        memory=memory,
        needs=NEEDS,
        note="no padding at all: texts cut to one length",
    )


CASES = (
    _forward(32),
    _forward(
        64, Bar("time/padded", 1 / 5), Bar("time/sorted", 1 / 1.5), Bar("time/onnx_padded", 1.0)
    ),
    *map(_forward, (128, 256, 512)),
    _step(32),
    _step(64, Bar("time/padded", 1 / 4)),
    *map(_step, (128, 256, 512)),
    _full(
        "forward",
        _build_forward,
        tuple(p for p in FORWARD if "sorted" not in p.name),
        memory=False,
    ),
    _full("step", _build_step, (Peer("output_packed"), Peer("padded")), memory=True),
    Case(
        "embedding/thousands",
        "padding_free",
        {"texts": 4096, "batch": 64, "longest": LONGEST},
        partial(_build_forward, False),
        QUICK,
        peers=(Peer("output_packed"), Peer("sorted")),
        reference="sorted",
        memory=False,
        slow=True,
        needs=NEEDS,
        note="sorting at its best: over thousands of texts",
    ),
)
