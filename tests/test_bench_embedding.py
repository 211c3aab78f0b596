"""The embedding benchmarks: batches hold each text once, peers take the paths they are named
after, fill is what it says."""

from __future__ import annotations

import pytest
import torch
from bench import embedding_ways as ways
from bench import peers
from bench.cases import all_cases
from bench.docstrings import docstrings

CASES = {name: case for name, case in all_cases().items() if case.topic == "embedding"}
LENGTHS = (5, 2, 9, 3, 3)


@pytest.fixture
def texts() -> ways.Texts:
    tokens = tuple(tuple(range(101, 101 + n)) for n in LENGTHS)
    return ways.Texts(tokens, 2, torch.zeros(len(tokens), 384))


def test_batches_hold_each_text_once(texts):
    for batches, lengths in (
        (texts.unsorted, [[5, 2], [9, 3], [3]]),
        (texts.by_length, [[2, 3], [3, 5], [9]]),
    ):
        assert [b.mask.sum(1).tolist() for b in batches] == lengths
        assert sorted(int(row) for b in batches for row in b.rows) == list(range(5))
        for batch in batches:
            ids_of = batch.columns["input_ids"]
            for ids, mask, row in zip(ids_of, batch.mask, batch.rows, strict=True):
                assert tuple(ids[mask == 1].tolist()) == texts.tokens[row]
                assert not ids[mask == 0].any()
    assert ways.fill(texts.unsorted) == 22 / (10 + 18 + 3)
    assert ways.fill(texts.by_length) == 22 / (6 + 10 + 9)


def test_docstrings_are_many_and_not_sorted():
    found = docstrings()
    assert len(found) > 3000 and len(set(found)) == len(found)
    assert list(found) != sorted(found) != sorted(found, key=len)


def test_every_size_of_the_issue_is_a_case():
    sizes = (32, 64, 128, 256, 512)
    for kind in ("forward", "step"):
        assert [CASES[f"embedding/{kind}_{n}"].shape["batch"] for n in sizes] == list(sizes)
    assert CASES["embedding/thousands"].shape["texts"] == 4096


def test_memory_is_asked_before_it_is_taken():
    assert peers.memory(1)("cpu") is None
    assert "more than half of this machine's memory" in peers.memory(2**60)("cpu")
    assert peers.memory(2**60)("cuda") is None


@pytest.mark.skipif(peers.minilm("cpu") is not None, reason=str(peers.minilm("cpu")))
def test_nested_takes_the_fast_path(texts):
    with torch.profiler.profile() as profiler:
        found = ways.forward(ways.nested, texts.unsorted, texts)
    names = {event.key for event in profiler.key_averages()}
    assert "aten::_nested_tensor_from_mask" in names
    assert "aten::_transformer_encoder_layer_fwd" in names
    assert torch.allclose(found.norm(dim=1), torch.ones(5))


@pytest.mark.skipif(peers.minilm("cpu") is not None, reason=str(peers.minilm("cpu")))
def test_long_texts_fill_a_batch():
    full = CASES["embedding/full_forward"]
    figures = full.build(full.sizes(quick=True), torch.device("cpu"), 0).figures({}, None)
    assert figures == {"fill": 1.0, "fill/sorted": 1.0}
