"""Stock heads on padding-free encoders: losses, logits on real positions, every gradient."""

from __future__ import annotations

import pytest
import torch
from encoder_models import (
    EMBEDDED,
    FIRST_KEPT,
    MASK,
    PREFIXES,
    WIDTH,
    assert_gradients,
    batch,
    gradients,
    labels_for,
    twins,
)

from varstream.testing import assert_exact

HEADS = [
    *(f"{p}For{h}" for p in PREFIXES for h in ("MaskedLM", "TokenClassification")),
    *(f"{p}ForSequenceClassification" for p in PREFIXES),
    *("BertForPreTraining", "BertForNextSentencePrediction", "ElectraForPreTraining"),
    "AlbertForPreTraining",
]


@pytest.mark.parametrize("name", HEADS)
def test_heads_equal_padded(name):
    """Loss, logits on real positions and every gradient, through transformers' own head."""
    dense, ours = twins(name, **({"num_labels": 2} if name == "AlbertForPreTraining" else {}))
    inputs = batch(FIRST_KEPT, name) | labels_for(name, FIRST_KEPT)
    want, got = dense(**inputs), ours(**inputs)
    assert type(got) is type(want) and list(got) == list(want)
    if name == "ModernBertForMaskedLM":  # its loss is in float32
        assert_exact(got.loss, want.loss, tolerance=1e-6)
        labels = inputs["labels"]
        for out in (got, want):
            out.loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    assert_exact(got.loss, want.loss, tolerance=1e-12)
    for field in want:
        if want[field].shape[:2] == FIRST_KEPT.shape:
            real = (FIRST_KEPT != 0).view(FIRST_KEPT.shape + (1,) * (want[field].dim() - 2))
            assert_exact(got[field] * real, want[field] * real, name=field)
    assert_gradients(gradients(ours, got.loss), gradients(dense, want.loss))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_multiple_choice(prefix):
    name = f"{prefix}ForMultipleChoice"
    dense, ours = twins(name)
    inputs = batch(FIRST_KEPT, name)
    inputs = {n: v.view(2, 2, -1) for n, v in inputs.items()} | {"labels": torch.tensor([0, 1])}
    want, got = dense(**inputs), ours(**inputs)
    assert_exact(got.logits, want.logits)
    assert_gradients(gradients(ours, got.loss), gradients(dense, want.loss), "classifier.bias")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_question_answering(prefix):
    """Logits on real positions always; the span loss where nothing is padding."""
    name = f"{prefix}ForQuestionAnswering"
    dense, ours = twins(name, num_labels=2)
    inputs = batch(MASK, name)
    want, got = dense(**inputs), ours(**inputs)
    assert_exact(got.start_logits * MASK, want.start_logits * MASK)
    spans = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 2])}
    full = batch(torch.ones(2, 6, dtype=torch.int64), name)
    assert_exact(ours(**full, **spans).loss, dense(**full, **spans).loss)
    spans = {name: torch.zeros(len(MASK), dtype=torch.int64) for name in spans}
    with pytest.raises(ValueError, match="start_positions can't be honoured on a padded batch"):
        ours(**inputs, **spans)


def test_tuples():
    dense, ours = twins("BertForMaskedLM")
    inputs = batch(FIRST_KEPT) | {"return_dict": False}
    assert len(ours(**inputs)) == len(dense(**inputs)) == 1
    assert len(ours.bert(**inputs)) == len(dense.bert(**inputs)) == 1
    positional = ours.bert(inputs["input_ids"], FIRST_KEPT, inputs["token_type_ids"])
    assert torch.equal(positional[0], ours.bert(**inputs)[0])


@pytest.mark.parametrize("suffix", ["MaskedLM", "TokenClassification", "SequenceClassification"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_heads_on_embeddings(prefix, suffix):
    """Embeddings as input get the padded model's gradients, 0 on padding."""
    name = f"{prefix}For{suffix}"
    dense, ours = twins(name)
    width = EMBEDDED.get(prefix, WIDTH)
    embeds = torch.randn(*FIRST_KEPT.shape, width, dtype=torch.float64)
    real = (FIRST_KEPT != 0)[..., None]
    grads = []
    for model in (ours, dense):
        leaf = embeds.clone().requires_grad_()
        logits = model(inputs_embeds=leaf, attention_mask=FIRST_KEPT).logits
        logits = logits if logits.dim() == 2 else logits * real
        grads.append(torch.autograd.grad(logits.sin().sum(), leaf)[0])
    assert_exact(*grads)
    assert (grads[0].masked_select(~real) == 0).all()


@pytest.mark.parametrize("suffix", ["MaskedLM", "SequenceClassification", "QuestionAnswering"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_heads_without_a_mask(prefix, suffix):
    """Every position is a token then; explicit positions, and tuples, come back as they were."""
    dense, ours = twins(f"{prefix}For{suffix}", num_labels=2)
    inputs = batch(torch.ones(3, 7, dtype=torch.int64), prefix)
    del inputs["attention_mask"]
    if prefix not in ("Electra", "MPNet", "Roberta", "XLMRoberta"):
        inputs["position_ids"] = torch.randint(20, (3, 7))
    if prefix == "DistilBert":
        del inputs["position_ids"]
    want, got = (model(**inputs, return_dict=False) for model in (dense, ours))
    assert isinstance(got, tuple) and len(got) == len(want)
    for ours_, theirs in zip(got, want, strict=True):
        assert_exact(ours_, theirs)
