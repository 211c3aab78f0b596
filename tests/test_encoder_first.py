"""A pooler or head that reads position 0 where that is padding: the padded model's row of it."""

from __future__ import annotations

import pytest
import torch
from encoder_models import (
    EMBEDDED,
    FIRST_PADDED,
    IMPLEMENTATIONS,
    POOLED,
    READ_PADDING,
    VOCAB,
    WIDTH,
    assert_gradients,
    batch,
    gradients,
    labels_for,
    make,
    twins,
)

import varstream as vs
from varstream.encoder import padding_free
from varstream.testing import assert_exact

REAL = (FIRST_PADDED != 0)[..., None]
READERS = [
    *(f"{prefix}ForSequenceClassification" for prefix in READ_PADDING),
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "AlbertForPreTraining",
]


def any_padding(name, mask=FIRST_PADDED):
    """A batch whose padding holds any tokens: the row at position 0 depends on its own."""
    inputs = batch(mask, name)
    return inputs | {"input_ids": torch.randint(1, VOCAB, mask.shape)}


def changes_for(name):
    return {"num_labels": 2} if name == "AlbertForPreTraining" else {}


@pytest.mark.parametrize(("prefix", "attention"), [(p, a) for p in POOLED for a in ("", "eager")])
def test_pooler(prefix, attention):
    """Its output, hidden states of the tokens, and every gradient; 0 on padding as ever."""
    name = f"{prefix}Model"
    attention = attention or IMPLEMENTATIONS[prefix][0]
    dense, ours = twins(name, attn_implementation=attention)
    for inputs in (batch(FIRST_PADDED, name), any_padding(name)):
        want, got = dense(**inputs), ours(**inputs)
        assert_exact(got.pooler_output, want.pooler_output)
        assert_exact(got[0], want[0] * REAL)
        assert not got[0].masked_select(~REAL).any()
        weight = torch.randn_like(want[0]) * REAL
        losses = [(out[0] * weight).sum() + out[1].sin().sum() for out in (got, want)]
        assert_gradients(gradients(ours, losses[0]), gradients(dense, losses[1]))


@pytest.mark.parametrize("name", READERS)
def test_heads(name):
    dense, ours = twins(name, **changes_for(name))
    inputs = any_padding(name) | labels_for(name, FIRST_PADDED)
    want, got = dense(**inputs), ours(**inputs)
    assert_exact(got.loss, want.loss, tolerance=1e-12)
    for field in want:
        if want[field].shape[:2] == FIRST_PADDED.shape:
            assert_exact(got[field], want[field] * REAL, name=field)
        else:
            assert_exact(got[field], want[field], name=field)
    assert_gradients(gradients(ours, got.loss), gradients(dense, want.loss))


@pytest.mark.parametrize("prefix", READ_PADDING)
def test_multiple_choice(prefix):
    name = f"{prefix}ForMultipleChoice"
    dense, ours = twins(name)
    inputs = {n: v.view(3, 2, -1) for n, v in any_padding(name).items()}
    inputs["labels"] = torch.tensor([0, 1, 1])
    want, got = dense(**inputs), ours(**inputs)
    assert_exact(got.logits, want.logits)
    assert_gradients(gradients(ours, got.loss), gradients(dense, want.loss), "classifier.bias")


@pytest.mark.parametrize("prefix", READ_PADDING)
def test_hooks_see_position_0(prefix):
    """A head then runs on padded output, and reads the row there."""
    name = f"{prefix}ForSequenceClassification"
    dense, ours = twins(name)
    seen = []
    ours.base_model.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    inputs = any_padding(name)
    assert_exact(ours(**inputs).logits, dense(**inputs).logits)
    want = dense.base_model(**inputs)[0]
    assert_exact(seen[0][:, 0], want[:, 0])
    assert_exact(seen[0][:, 1:], (want * REAL)[:, 1:])


@pytest.mark.parametrize("prefix", READ_PADDING)
def test_embeddings_as_input(prefix):
    """Those at position 0 get their gradient where they are padding; other padding may be NaN."""
    name = f"{prefix}ForSequenceClassification"
    dense, ours = twins(name)
    embeds = torch.randn(*FIRST_PADDED.shape, EMBEDDED.get(prefix, WIDTH), dtype=torch.float64)
    read = REAL.clone()
    read[:, 0] = True
    leaves = [embeds.clone().requires_grad_() for _ in range(2)]
    ours_in = leaves[0].where(read, torch.nan)
    found, want = (
        torch.autograd.grad(
            model(inputs_embeds=x, attention_mask=FIRST_PADDED).logits.sin().sum(), leaf
        )[0]
        for model, x, leaf in ((ours, ours_in, leaves[0]), (dense, leaves[1], leaves[1]))
    )
    assert_exact(found, want)
    assert found[0, 0].any() and not found.masked_select(~read).any()


@pytest.mark.parametrize("prefix", POOLED)
def test_output_packed(prefix):
    """Real tokens only; the pooler's output beside."""
    name = f"{prefix}Model"
    ours = padding_free(make(name))
    inputs = any_padding(name)
    padded, found = ours(**inputs), ours(**inputs, output_packed=True)
    assert found[0].cu_seqlens.diff().tolist() == FIRST_PADDED.sum(1).tolist()
    assert torch.equal(vs.unpack(found[0]), padded[0])
    assert torch.equal(found.pooler_output, padded.pooler_output)


@pytest.mark.parametrize("prefix", POOLED)
def test_rows_that_are_all_padding_stay_without_a_row(prefix):
    name = f"{prefix}Model"
    dense, ours = twins(name)
    mask = torch.cat([torch.zeros(1, FIRST_PADDED.shape[1], dtype=torch.int64), FIRST_PADDED])
    inputs = any_padding(name, mask)
    got, want = ours(**inputs), dense(**{n: v[1:] for n, v in inputs.items()})
    assert_exact(got.pooler_output[1:], want.pooler_output)
    assert not got[0][0].any()
    zeros = ours(**{n: v[:1] for n, v in inputs.items()}).pooler_output
    assert torch.equal(got.pooler_output[:1], zeros)


def test_layers_run_on_one_row_more_for_each():
    ours = padding_free(make("BertModel"))
    seen = []
    ours.encoder.layer[1].register_forward_hook(lambda m, args, out: seen.append(len(out)))
    ours(**batch(FIRST_PADDED))
    assert seen == [int(FIRST_PADDED.sum() + (FIRST_PADDED[:, 0] == 0).sum())]
    alone = padding_free(make("BertModel", pooler=False))
    alone.encoder.layer[1].register_forward_hook(lambda m, args, out: seen.append(len(out)))
    alone(**batch(FIRST_PADDED))
    assert seen[1] == int(FIRST_PADDED.sum())


def test_gradient_checkpointing():
    dense, ours = twins("BertForSequenceClassification")
    ours.gradient_checkpointing_enable()
    inputs = any_padding("Bert") | labels_for("BertForSequenceClassification", FIRST_PADDED)
    want, got = dense(**inputs).loss, ours(**inputs).loss
    assert_gradients(gradients(ours, got), gradients(dense, want))
