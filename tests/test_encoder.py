"""Padding-free encoders against the padded Hugging Face models: outputs and gradients."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from encoder_models import (
    EMBEDDED,
    FIRST_KEPT,
    IMPLEMENTATIONS,
    MASK,
    POOLED,
    PREFIXES,
    VOCAB,
    WIDTH,
    assert_gradients,
    batch,
    gradients,
    labels_for,
    make,
    twins,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

import varstream as vs
from varstream.encoder import padding_free, restore_padding
from varstream.testing import assert_error_ratio, assert_exact, peak_memory


def assert_same_encoder(dense, ours, inputs, mask):
    """Real positions equal, padded positions 0, gradients of a loss over real positions equal."""
    want, got = dense(**inputs), ours(**inputs)
    assert type(got) is type(want) and list(got) == list(want)
    real = (mask != 0)[..., None]
    assert_exact(got[0] * real, want[0] * real)
    assert (got[0].masked_select(~real) == 0).all()
    weight = torch.randn_like(want[0]) * real
    losses = [(out[0] * weight).sum() for out in (got, want)]
    if "pooler_output" in want:
        assert_exact(got.pooler_output, want.pooler_output)
        losses = [
            loss + out.pooler_output.sum() for loss, out in zip(losses, (got, want), strict=True)
        ]
    assert_gradients(gradients(ours, losses[0]), gradients(dense, losses[1]))


@pytest.mark.parametrize(
    ("prefix", "attention"), [(p, a) for p in PREFIXES for a in IMPLEMENTATIONS[p]]
)
def test_encoder_equals_padded(prefix, attention):
    """Right and left padding, holes, one token; dense rows too."""
    name = f"{prefix}Model"
    dense, ours = twins(name, attn_implementation=attention, **_no_pooler(prefix))
    assert_same_encoder(dense, ours, batch(MASK, name), MASK)
    assert_same_encoder(dense.eval(), ours.eval(), batch(MASK, name), MASK)


def _no_pooler(prefix):
    return {"pooler": False} if prefix in POOLED else {}


@pytest.mark.parametrize("prefix", POOLED)
def test_pooler_equals_padded(prefix):
    name = f"{prefix}Model"
    dense, ours = twins(name)
    assert_same_encoder(dense, ours, batch(FIRST_KEPT, name), FIRST_KEPT)


def test_no_mask():
    dense, ours = twins()
    inputs = batch(torch.ones(3, 7, dtype=torch.int64))
    del inputs["attention_mask"], inputs["token_type_ids"]
    assert_same_encoder(dense, ours, inputs, torch.ones(3, 7))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_dtypes(dtype):
    _, ours = twins()
    inputs = batch(FIRST_KEPT)
    want = ours(**inputs).last_hidden_state
    inputs["attention_mask"] = FIRST_KEPT.to(dtype)
    assert torch.equal(ours(**inputs).last_hidden_state, want)


def test_rows_that_are_all_padding():
    dense, ours = twins()
    mask = torch.cat([torch.zeros(1, 11, dtype=torch.int64), FIRST_KEPT])
    inputs = batch(mask)
    got = ours(**inputs)
    kept = {name: value[1:] for name, value in inputs.items()}
    want = dense(**kept).last_hidden_state * FIRST_KEPT[..., None]
    assert_exact(got.last_hidden_state[1:], want)
    assert (got.last_hidden_state[0] == 0).all()
    only = ours(**{name: value[:1] for name, value in inputs.items()})
    only.last_hidden_state.sum().backward()
    assert (only.last_hidden_state == 0).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**30))
def test_any_mask(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(2, (rows, columns), generator=generator)
    dense, ours = twins("BertModel", num_hidden_layers=1, pooler=False)
    some = mask.any(1)
    inputs = batch(mask)
    got = ours(**inputs).last_hidden_state
    assert (got[mask == 0] == 0).all()
    if some.any():
        want = dense(**{name: value[some] for name, value in inputs.items()}).last_hidden_state
        assert_exact(got[mask != 0], want[mask[some] != 0])


@pytest.mark.parametrize("prefix", ["Bert", "Roberta", "DistilBert"])
def test_explicit_positions(prefix):
    name = f"{prefix}Model"
    dense, ours = twins(name, **_no_pooler(prefix))
    inputs = batch(MASK, name)
    for rows in (1, len(MASK)):
        inputs["position_ids"] = torch.randint(2, 24, (rows, MASK.shape[1]))
        if prefix == "Roberta":  # the padded model needs them for its token types
            inputs["position_ids"] = inputs["position_ids"].expand(MASK.shape)
        assert_same_encoder(dense, ours, inputs, MASK)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_embeddings_as_input(prefix):
    """Their gradients are exact and zero on padding, and NaN in padding reaches nothing."""
    name = f"{prefix}Model"
    dense, ours = twins(name, **_no_pooler(prefix))
    embeds = torch.randn(*MASK.shape, EMBEDDED.get(prefix, WIDTH), dtype=torch.float64)
    real = (MASK != 0)[..., None]
    weight = torch.randn(*MASK.shape, WIDTH, dtype=torch.float64) * real
    leaves = [embeds.clone().requires_grad_() for _ in range(2)]
    outs = [
        model(inputs_embeds=leaf, attention_mask=MASK).last_hidden_state
        for model, leaf in zip((dense, ours), leaves, strict=True)
    ]
    want, got = (
        torch.autograd.grad((out * weight).sum(), leaf)[0]
        for out, leaf in zip(outs, leaves, strict=True)
    )
    assert_exact(outs[1], outs[0] * real)
    assert_exact(got, want)
    assert (got.masked_select(~real) == 0).all()
    poisoned = torch.where(real, embeds, torch.nan).requires_grad_()
    out = ours(inputs_embeds=poisoned, attention_mask=MASK).last_hidden_state
    assert torch.equal(out, outs[1])
    out.sum().backward()
    assert poisoned.grad.isfinite().all()


def test_sequences_do_not_see_each_other():
    _, ours = twins("BertModel", pooler=False)
    inputs = batch(MASK)
    whole = ours(**inputs).last_hidden_state
    for row in range(len(MASK)):
        alone = ours(**{name: value[row : row + 1] for name, value in inputs.items()})
        assert_exact(alone.last_hidden_state[0], whole[row])


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize("prefix", ["Bert", "DistilBert"])
def test_activations(prefix, act):
    name = f"{prefix}Model"
    key = "activation" if prefix == "DistilBert" else "hidden_act"
    dense, ours = twins(name, **{key: act})
    assert_same_encoder(dense, ours, batch(FIRST_KEPT, name), FIRST_KEPT)


# --- training -------------------------------------------------------------------------------------


def test_hidden_dropout_draws_as_the_padded_model_where_nothing_is_padding():
    """Packed rows are then the padded rows, so the same seed gives the same masks."""
    for name, drop in (("BertModel", "hidden_dropout_prob"), ("DistilBertModel", "dropout")):
        dense, ours = twins(name, **{drop: 0.3})
        inputs = batch(torch.ones(3, 7, dtype=torch.int64), name)
        outs = []
        for model in (dense, ours):
            torch.manual_seed(5)
            outs.append(model(**inputs)[0])
        assert_exact(outs[1], outs[0])
        found = gradients(ours, outs[1].square().sum())
        expected = gradients(dense, outs[0].square().sum())
        assert_gradients(found, expected)
        assert not torch.equal(ours(**inputs)[0], ours(**inputs)[0])
        assert torch.equal(ours.eval()(**inputs)[0], ours(**inputs)[0])


def test_attention_dropout():
    """Only in training, unbiased: the mean over draws comes near the undropped result."""
    changes = {"attention_probs_dropout_prob": 0.2, "num_hidden_layers": 1, "pooler": False}
    _, ours = twins("BertModel", **changes)
    inputs = batch(MASK)
    ours.eval()
    calm = ours(**inputs)[0]
    assert torch.equal(calm, ours(**inputs)[0])
    ours.train()
    with torch.no_grad():
        draws = torch.stack([ours(**inputs)[0] for _ in range(200)])
    spread = draws.std(0).norm() / calm.norm()
    assert 0.01 < spread < 1
    assert (draws.mean(0) - calm).norm() / calm.norm() < 0.4 * spread


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Same gradients, dropout masks included, from less memory."""
    drops = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    _, ours = twins("BertForMaskedLM", **drops, num_hidden_layers=4)
    inputs = batch(FIRST_KEPT) | labels_for("BertForMaskedLM", FIRST_KEPT)

    def grads():
        torch.manual_seed(3)
        return gradients(ours, ours(**inputs).loss)

    want, plain = grads(), peak_memory(grads)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = grads()
    assert_gradients(found, want)
    big = batch(torch.ones(8, 24, dtype=torch.int64))
    sizes = []
    for step in (ours.gradient_checkpointing_enable, ours.gradient_checkpointing_disable):
        step()
        kept = []
        sizes.append(peak_memory(lambda kept=kept: kept.append(ours.bert(**big)[0])))
    assert sizes[0] < 0.6 * sizes[1]
    assert plain > 0


def test_memory_follows_real_tokens():
    """A batch that is mostly padding costs a fraction of the padded model's activations."""
    dense, ours = twins(max_position_embeddings=64, num_hidden_layers=3)
    mask = (torch.arange(64) < torch.tensor([64, 4, 3, 2, 5, 1, 2, 3])[:, None]).long()
    inputs = batch(mask)
    sizes = []
    for model in (ours, dense):
        kept = []
        sizes.append(peak_memory(lambda m=model, kept=kept: kept.append(m(**inputs))))
    assert sizes[0] < 0.4 * sizes[1]


@pytest.mark.parametrize("prefix", ["Bert", "DistilBert"])
def test_bfloat16(prefix):
    name = f"{prefix}ForMaskedLM"
    exact = make(name, num_hidden_layers=3) if prefix == "Bert" else make(name, n_layers=3)
    plain = copy.deepcopy(exact).to(torch.bfloat16)
    ours = padding_free(copy.deepcopy(plain))
    exact = copy.deepcopy(plain).double()  # the same rounded weights
    inputs = batch(FIRST_KEPT, name) | labels_for(name, FIRST_KEPT)
    outs = [model(**inputs) for model in (ours, plain, exact)]
    real = (FIRST_KEPT != 0)[..., None]
    assert outs[0].logits.dtype == torch.bfloat16
    assert_error_ratio(*(out.logits * real for out in outs))
    grads = [
        torch.cat([g.flatten().double() for g in gradients(m, out.loss).values() if g is not None])
        for m, out in zip((ours, plain, exact), outs, strict=True)
    ]
    errors = [(g - grads[2]).norm() / grads[2].norm() for g in grads[:2]]
    assert errors[0] <= 2 * errors[1], errors


def test_autocast_and_float32():
    dense, ours = twins("BertForMaskedLM", torch.float32)
    inputs = batch(FIRST_KEPT) | labels_for("BertForMaskedLM", FIRST_KEPT)
    assert_exact(ours(**inputs).loss, dense(**inputs).loss, tolerance=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = dense(**inputs).loss, ours(**inputs).loss
    assert got.dtype == want.dtype
    assert_exact(got, want, tolerance=2e-2)
    assert all(g is None or g.dtype == torch.float32 for g in gradients(ours, got).values())


# --- in and out -----------------------------------------------------------------------------------


def test_model_stays_the_same_model():
    dense = make("BertForMaskedLM")
    before = dense.state_dict()
    ours = padding_free(dense)
    assert ours is dense
    after = ours.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_restore():
    dense, ours = twins("BertForMaskedLM")
    inputs = batch(FIRST_KEPT)
    assert restore_padding(ours) is ours
    assert torch.equal(ours(**inputs).logits, dense(**inputs).logits)
    assert not any("forward" in module.__dict__ for module in ours.modules())
    with pytest.raises(ValueError, match="BertForMaskedLM is not a padding-free model"):
        restore_padding(ours)
    with pytest.raises(ValueError, match="int is not a padding-free model"):
        restore_padding(3)


def test_twice_and_from_the_inside_out():
    dense = make("BertForMaskedLM")
    want = dense(**batch(FIRST_KEPT)).logits
    torch.manual_seed(0)
    ours = padding_free(padding_free(dense))
    assert restore_padding(ours).forward.__func__ is type(dense).forward
    padding_free(dense.bert)
    padding_free(dense)
    restore_padding(dense)
    assert not any("forward" in module.__dict__ for module in dense.modules())
    assert want.shape == dense(**batch(FIRST_KEPT)).logits.shape


def test_restore_refuses_a_wrapped_forward():
    ours = padding_free(make())
    ours.encoder.layer[0].forward = lambda x: x
    with pytest.raises(ValueError, match="BertLayer.forward was replaced after vs.padding_free"):
        restore_padding(ours)


def test_deepcopy_and_pickle():
    _, ours = twins("ElectraForMaskedLM")
    inputs = batch(FIRST_KEPT, "Electra")
    want = ours(**inputs).logits
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(**inputs).logits, want)
        assert other.electra.forward.args[0] is other.electra  # its own, not the original's
        with torch.no_grad():
            other.electra.embeddings.word_embeddings.weight.zero_()
        assert torch.equal(ours(**inputs).logits, want)
        restore_padding(other)


def test_signatures_stay():
    """Trainers read them to see which columns a model takes."""
    dense, ours = twins("BertForSequenceClassification")
    for name, module in ours.named_modules():
        if "forward" in module.__dict__:
            want = inspect.signature(dense.get_submodule(name).forward)
            assert list(inspect.signature(module.forward).parameters) == list(want.parameters)


def test_trainer(tmp_path):
    """transformers' Trainer takes the same steps, with gradient checkpointing too."""
    mask = torch.arange(8) < (3 + torch.arange(12) % 5)[:, None]
    ids = torch.randint(2, VOCAB, mask.shape)
    rows = [
        {"input_ids": i, "attention_mask": m.long(), "labels": n % 3}
        for n, (i, m) in enumerate(zip(ids, mask, strict=True))
    ]
    losses = []
    for model in twins("BertForSequenceClassification", torch.float32):
        options = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=hasattr(model, "_varstream_padding_free"),
        )
        trainer = Trainer(model, options, train_dataset=rows)
        trainer.train()
        losses.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
    assert len(losses[0]) == 3 and losses[0][0] != losses[0][2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_compiled_around():
    """The encoder itself stays outside compiled graphs."""
    _, ours = twins("BertForMaskedLM")
    inputs = batch(FIRST_KEPT)
    assert_exact(torch.compile(ours, backend="aot_eager")(**inputs).logits, ours(**inputs).logits)


def test_layers_alone_run_their_own_forward():
    dense, ours = twins()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    layers = (model.encoder.layer[0] for model in (ours, dense))
    assert torch.equal(*(layer(x) for layer in layers))


def test_hooks_on_layers_fire():
    _, ours = twins()
    seen = []
    ours.encoder.layer[1].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    ours(**batch(FIRST_KEPT))
    assert seen == [(int(FIRST_KEPT.sum()), WIDTH)]


def test_public_names():
    assert vs.encoder.padding_free is padding_free and vs.encoder.restore_padding is restore_padding
