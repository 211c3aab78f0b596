"""What is special to a family: DeBERTa's terms, ModernBERT's windows and pooling, ALBERT's groups,
MPNet's distances; and that every part of every family is guarded."""

from __future__ import annotations

import copy

import pytest
import torch
from encoder_models import (
    FIRST_KEPT,
    MASK,
    PREFIXES,
    VOCAB,
    assert_gradients,
    batch,
    gradients,
    make,
    twins,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import varstream as vs
from varstream.encoder import padding_free
from varstream.testing import assert_error_ratio, assert_exact

NEW = ("Albert", "MPNet", "DebertaV2", "ModernBert")
LAYERS = {"DistilBert": "transformer.layer", "ModernBert": "layers"} | {
    "Albert": "encoder.albert_layer_groups.1.albert_layers"
}


def assert_same(dense, ours, mask, name):
    """Hidden states of real positions, and the gradients of a loss on them."""
    inputs = batch(mask, name)
    real = (mask != 0)[..., None]
    want, got = dense(**inputs)[0] * real, ours(**inputs)[0]
    assert_exact(got, want)
    weight = torch.randn_like(want)
    found = gradients(ours, (got * weight).sum())
    assert_gradients(found, gradients(dense, (want * weight).sum()))
    assert any(g is not None and g.any() for g in found.values())


DEBERTA = {
    "c2p": {"pos_att_type": ["c2p"]},
    "p2c": {"pos_att_type": "p2c"},
    "neither": {"pos_att_type": []},
    "own_projections": {"share_att_key": False},
    "own_c2p": {"share_att_key": False, "pos_att_type": ["c2p"]},
    "own_p2c": {"share_att_key": False, "pos_att_type": ["p2c"]},
    "no_norm": {"norm_rel_ebd": "none"},
    "more_buckets": {"position_buckets": 8},
    "distances": {"position_buckets": -1, "max_relative_positions": 5},
    "all_distances": {"position_buckets": -1},
    "absolute": {"relative_attention": False},
    "no_positions": {"position_biased_input": False},
    "no_types": {"type_vocab_size": 0},
    "narrow": {"embedding_size": 16},
}


@pytest.mark.parametrize("changes", DEBERTA.values(), ids=DEBERTA)
def test_deberta(changes):
    """Each term, with buckets and without, in rows longer than either."""
    dense, ours = twins("DebertaV2Model", **changes)
    inputs = batch(MASK, "DebertaV2")
    if "type_vocab_size" in changes:
        del inputs["token_type_ids"]
    real = (MASK != 0)[..., None]
    want, got = dense(**inputs)[0] * real, ours(**inputs)[0]
    assert_exact(got, want)
    found, expected = (gradients(m, x.sin().sum()) for m, x in ((ours, got), (dense, want)))
    assert_gradients(found, expected, "encoder.LayerNorm.bias")  # moves all rows of c2p alike
    relative = "encoder.rel_embeddings.weight"
    reads = changes.get("pos_att_type") != [] and "relative_attention" not in changes
    assert not reads or found[relative].any()


def test_deberta_of_a_published_shape():
    """256 buckets of 512 distances, over a row that reaches the logarithmic ones."""
    changes = {"position_buckets": 256, "max_position_embeddings": 512, "num_hidden_layers": 1}
    dense, ours = twins("DebertaV2Model", **changes)
    assert_same(dense, ours, (torch.arange(300) < torch.tensor([[300], [7]])).long(), "DebertaV2")


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["MPNet", "DebertaV2", "ModernBert"]),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(0, 2**30),
)
def test_any_mask(prefix, rows, columns, seed):
    """Where distances count: holes of every kind, rows without a token."""
    mask = torch.randint(2, (rows, columns), generator=torch.Generator().manual_seed(seed))
    changes = {"pooler": False} if prefix == "MPNet" else {}
    dense, ours = twins(f"{prefix}Model", num_hidden_layers=2, **changes)
    some = mask.any(1)
    inputs = batch(mask, prefix)
    got = ours(**inputs).last_hidden_state
    assert (got[mask == 0] == 0).all()
    if some.any():
        want = dense(**{name: value[some] for name, value in inputs.items()}).last_hidden_state
        assert_exact(got[mask != 0], want[mask[some] != 0])


def test_mpnet_over_far_distances():
    dense, ours = twins("MPNetModel", max_position_embeddings=300, num_hidden_layers=1)
    mask = (torch.arange(200) < torch.tensor([[200], [9]])).long()
    mask[0, 50:140] = 0  # the distance over a hole counts
    assert_same(dense, ours, mask, "MPNet")


@pytest.mark.parametrize(
    ("layers", "groups", "inner"), [(1, 1, 1), (5, 2, 2), (6, 3, 1), (4, 1, 3)]
)
def test_albert_groups(layers, groups, inner):
    changes = {"num_hidden_layers": layers, "num_hidden_groups": groups, "inner_group_num": inner}
    dense, ours = twins("AlbertModel", pooler=False, **changes)
    assert_same(dense, ours, MASK, "Albert")


MODERNBERT = {
    "wide_window": {"local_attention": 64},
    "no_window": {"layer_types": ["full_attention"] * 4},
    "only_windows": {"layer_types": ["sliding_attention"] * 4},
    "biases": {"attention_bias": True, "mlp_bias": True, "norm_bias": True},
    "dropout_off": {"attention_dropout": 0.0},
    "one_theta": {"global_rope_theta": 100.0, "local_rope_theta": 100.0},
    "scaled": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        }
    },
    "silu": {"hidden_activation": "silu"},
}


@pytest.mark.parametrize("changes", MODERNBERT.values(), ids=MODERNBERT)
def test_modernbert(changes):
    dense, ours = twins("ModernBertModel", **changes)
    assert_same(dense, ours, MASK, "ModernBert")


@pytest.mark.parametrize("mask", [FIRST_KEPT, MASK], ids=["first_kept", "left"])
@pytest.mark.parametrize("head", ["SequenceClassification", "MultipleChoice"])
def test_modernbert_mean(head, mask):
    """Pooling by mean reads no padding, wherever it stands."""
    name = f"ModernBertFor{head}"
    dense, ours = twins(name, classifier_pooling="mean")
    inputs = batch(mask, name)
    if head == "MultipleChoice":
        inputs = {n: v[:4].view(2, 2, -1) for n, v in inputs.items()}
    inputs["labels"] = torch.tensor([0, 1, 0, 1, 0][: len(inputs["input_ids"])])
    want, got = dense(**inputs), ours(**inputs)
    assert_exact(got.logits, want.logits)
    assert_gradients(gradients(ours, got.loss), gradients(dense, want.loss), "classifier.bias")


def test_modernbert_multiple_choice_finds_the_first_token():
    dense, ours = twins("ModernBertForMultipleChoice")
    inputs = {n: v[None, :2] for n, v in batch(MASK, "ModernBert").items()}
    assert_exact(ours(**inputs).logits, dense(**inputs).logits)


def test_modernbert_sparse_prediction():
    dense, ours = twins("ModernBertForMaskedLM", sparse_prediction=True)
    inputs = batch(MASK, "ModernBert")
    labels = torch.randint(VOCAB, MASK.shape)
    inputs["labels"] = labels.masked_fill((MASK == 0) | (labels % 3 == 0), -100)
    want, got = dense(**inputs), ours(**inputs)
    assert got.logits.shape == want.logits.shape == ((inputs["labels"] != -100).sum(), VOCAB)
    assert_exact(got.logits, want.logits)


# --- training -------------------------------------------------------------------------------------

DROPS = {
    "Albert": {"hidden_dropout_prob": 0.3},
    "MPNet": {"hidden_dropout_prob": 0.3},
    "DebertaV2": {"hidden_dropout_prob": 0.3},
    "ModernBert": {"embedding_dropout": 0.3, "mlp_dropout": 0.3},
}


@pytest.mark.parametrize("prefix", NEW)
def test_hidden_dropout_draws_as_the_padded_model_where_nothing_is_padding(prefix):
    name = f"{prefix}Model"
    dense, ours = twins(name, **DROPS[prefix])
    inputs = batch(torch.ones(3, 7, dtype=torch.int64), name)
    outs = []
    for model in (dense, ours):
        torch.manual_seed(5)
        outs.append(model(**inputs)[0])
    assert_exact(outs[1], outs[0])
    found = gradients(ours, outs[1].sin().sum())
    assert_gradients(found, gradients(dense, outs[0].sin().sum()))
    assert not torch.equal(ours(**inputs)[0], ours(**inputs)[0])
    assert torch.equal(ours.eval()(**inputs)[0], ours(**inputs)[0])


@pytest.mark.parametrize("prefix", NEW)
def test_attention_dropout(prefix):
    """Only in training, unbiased: the mean over draws comes near the undropped result."""
    key = "attention_dropout" if prefix == "ModernBert" else "attention_probs_dropout_prob"
    changes = {"pooler": False} if prefix in ("Albert", "MPNet") else {}
    _, ours = twins(f"{prefix}Model", **{key: 0.1}, num_hidden_layers=2, **changes)
    inputs = batch(MASK, prefix)
    ours.eval()
    calm = ours(**inputs)[0]
    assert torch.equal(calm, ours(**inputs)[0])
    ours.train()
    with torch.no_grad():
        draws = torch.stack([ours(**inputs)[0] for _ in range(100)])
    spread = draws.std(0).norm() / calm.norm()
    assert 0.005 < spread < 1
    assert (draws.mean(0) - calm).norm() / calm.norm() < 0.5 * spread


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("prefix", ["DebertaV2", "ModernBert"])
def test_gradient_checkpointing(prefix, reentrant):
    """Same gradients, of the tables that layers share too, dropout masks included."""
    _, ours = twins(f"{prefix}ForMaskedLM", **DROPS[prefix])
    inputs = batch(MASK, prefix)
    inputs["labels"] = inputs["input_ids"].masked_fill(MASK == 0, -100)

    def grads():
        torch.manual_seed(3)
        return gradients(ours, ours(**inputs).loss)

    want = grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_gradients(grads(), want)


@pytest.mark.parametrize("prefix", NEW)
def test_bfloat16(prefix):
    name = f"{prefix}ForTokenClassification"
    plain = make(name).to(torch.bfloat16)
    ours = padding_free(copy.deepcopy(plain))
    exact = copy.deepcopy(plain).double()  # the same rounded weights
    inputs = batch(FIRST_KEPT, name)
    inputs["labels"] = torch.randint(3, FIRST_KEPT.shape).masked_fill(FIRST_KEPT == 0, -100)
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


@pytest.mark.parametrize("prefix", NEW)
def test_float32_and_autocast(prefix):
    name = f"{prefix}ForTokenClassification"
    dense, ours = twins(name, torch.float32)
    inputs = batch(MASK, name)
    real = (MASK != 0)[..., None]
    assert_exact(ours(**inputs).logits, dense(**inputs).logits * real, tolerance=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = dense(**inputs).logits * real, ours(**inputs).logits
    assert got.dtype == want.dtype
    assert_exact(got, want, tolerance=3e-2)
    grads = gradients(ours, got.float().sum())
    assert all(g is None or g.dtype == torch.float32 for g in grads.values())


# --- what is refused ------------------------------------------------------------------------------


def inner_modules(prefix):
    """Every module within one layer."""
    layers = LAYERS.get(prefix, "encoder.layer")
    layer = make(f"{prefix}Model").get_submodule(f"{layers}.1")
    return [f"{layers}.1.{name}" for name, _ in layer.named_modules() if name]


PARTS = [(prefix, path) for prefix in PREFIXES for path in inner_modules(prefix)]


@pytest.mark.parametrize(("prefix", "path"), PARTS, ids=lambda x: x)
def test_every_part_of_a_layer_is_guarded(prefix, path):
    """Hooks, a forward on the instance and a subclass are refused, at the start and later."""
    model = make(f"{prefix}Model")
    inputs = batch(FIRST_KEPT, prefix)
    part = model.get_submodule(path)
    own = type("Own", (type(part),), {})
    changes = {
        "has hooks, which would not fire": (
            lambda: part.register_forward_hook(lambda *_: None),
            lambda handle: handle.remove(),
        ),
        "has a forward set on the instance": (
            lambda: setattr(part, "forward", lambda *_, **__: None),
            lambda _: delattr(part, "forward"),
        ),
        "Own": (
            lambda: setattr(part, "__class__", own),
            lambda _: setattr(part, "__class__", own.__base__),
        ),
    }
    for message, (change, undo) in changes.items():
        undone = change()
        with pytest.raises(vs.UnsupportedModelError, match=message):
            padding_free(model)
        assert not any("_varstream_padding_free" in m.__dict__ for m in model.modules())
        undo(undone)
        padding_free(model)
        undone = change()
        with pytest.raises(vs.UnsupportedModelError, match=message):
            model(**inputs)
        undo(undone)
        vs.restore_padding(model)


def test_containers_and_tables_are_guarded():
    for prefix, path in (
        ("Albert", "encoder"),
        ("Albert", "encoder.albert_layer_groups.1"),
        ("MPNet", "encoder"),
        ("MPNet", "encoder.relative_attention_bias"),
        ("DebertaV2", "encoder"),
    ):
        model = padding_free(make(f"{prefix}Model"))
        handle = model.get_submodule(path).register_forward_hook(lambda *_: None)
        with pytest.raises(vs.UnsupportedModelError, match=f"{path} has hooks, which would not"):
            model(**batch(FIRST_KEPT, prefix))
        handle.remove()
        model(**batch(FIRST_KEPT, prefix))


def untouched(model):
    return not any(
        "forward" in m.__dict__ or "_varstream_padding_free" in m.__dict__ for m in model.modules()
    )


def test_models_are_refused():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    table = make("MPNetModel")
    table.encoder.relative_attention_bias = nn.Embedding(20, 3)
    more_steps = make("DebertaV2Model")
    more_steps.z_steps = 2
    layer = make("ModernBertModel")
    layer.layers[2] = nn.Identity()
    refused = {
        "encoder.conv is a part .*conv_kernel_size is 3": make(
            "DebertaV2Model", conv_kernel_size=3
        ),
        "z_steps is 2; vs.padding_free runs the last layer once": more_steps,
        "relative_attention_bias is not a plain nn.Embedding of 32 rows": table,
        "rotary embeddings of type 'dynamic' follow the padded length": make(
            "ModernBertModel",
            rope_parameters={"full_attention": dynamic, "sliding_attention": dynamic},
        ),
        "layers.2 is a torch.nn.modules.linear.Identity, not a class of": layer,
        "attn has heads of 264, more than 256": make(
            "ModernBertModel", hidden_size=264, num_attention_heads=1
        ),
        "attention.self has heads of 264": make(
            "DebertaV2Model", hidden_size=264, num_attention_heads=1
        ),
    }
    for message, model in refused.items():
        with pytest.raises(vs.UnsupportedModelError, match=message):
            padding_free(model)
        assert untouched(model)


def test_holes_need_room_in_a_head():
    """Gaps are hidden by 8 more columns."""
    _, ours = twins("MPNetModel", hidden_size=256, num_attention_heads=1, pooler=False)
    ours(**batch(MASK[:2], "MPNet"))
    with pytest.raises(ValueError, match="must have no holes, .* for heads of 256, more than 248"):
        ours(**batch(MASK, "MPNet"))
