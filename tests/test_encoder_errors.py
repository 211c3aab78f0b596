"""What a padding-free encoder refuses, by name and before anything is changed."""

from __future__ import annotations

import pytest
import torch
from encoder_models import FIRST_KEPT, MASK, WIDTH, batch, make, twins
from torch import nn
from transformers import BertConfig, BertLMHeadModel, BertModel, GPT2Config, GPT2Model

import varstream as vs
from varstream.encoder import padding_free, restore_padding


def untouched(model):
    return not any(
        "forward" in m.__dict__ or "_varstream_padding_free" in m.__dict__ for m in model.modules()
    )


class OwnBert(BertModel):
    pass


class OwnLinear(nn.Linear):
    pass


def own_linear(model):
    model.encoder.layer[1].attention.self.query = OwnLinear(WIDTH, WIDTH)


def own_norm(model):
    model.encoder.layer[0].output.LayerNorm = nn.RMSNorm(WIDTH)


def own_activation(model):
    intermediate = model.encoder.layer[0].intermediate
    del intermediate.intermediate_act_fn
    intermediate.intermediate_act_fn = lambda x: x - x.mean(0)


def own_module_activation(model):
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.BatchNorm1d(40)


def extra_part(model):
    model.encoder.layer[0].attention.adapter = nn.Linear(WIDTH, WIDTH)


def extra_backbone_part(model):
    model.adapter = nn.Linear(WIDTH, WIDTH)


def part_gone(model):
    del model.encoder.layer[0].output.dense


def hooked(model):
    model.encoder.layer[1].output.register_forward_hook(lambda *_: None)


def hooked_activation(model):
    act = model.encoder.layer[1].intermediate.intermediate_act_fn
    act.register_forward_pre_hook(lambda *_: None)


def hooked_stack(model):
    model.encoder.register_forward_pre_hook(lambda *_: None)


def forward_on_instance(model):
    model.encoder.layer[0].attention.output.dense.forward = lambda x: x


def forward_on_attention(model):
    model.encoder.layer[0].attention.self.forward = lambda x: x


CHANGED = {
    own_linear: r"BertLayer.*|encoder.layer.1.attention.self.query is a OwnLinear, not a plain",
    own_norm: "encoder.layer.0.output.LayerNorm is a RMSNorm, not a plain nn.LayerNorm",
    own_activation: "intermediate_act_fn is <function own_activation.* not an activation of",
    own_module_activation: "is a torch.nn.modules.batchnorm.BatchNorm1d, not an activation of",
    extra_part: "encoder.layer.0.attention.adapter is a part that vs.padding_free doesn't",
    extra_backbone_part: "adapter is a part that vs.padding_free doesn't understand",
    part_gone: "encoder.layer.0.output.dense is missing, not a plain nn.Linear",
    hooked: "encoder.layer.1.output has hooks, which would not fire",
    hooked_activation: "intermediate_act_fn has hooks, which would not fire",
    hooked_stack: "encoder has hooks, which would not fire",
    forward_on_instance: "attention.output.dense has a forward set on the instance",
    forward_on_attention: "attention.self has a forward set on the instance",
}


@pytest.mark.parametrize("change", CHANGED)
def test_changed_models_are_refused(change):
    model = make()
    change(model)
    with pytest.raises(vs.UnsupportedModelError, match=CHANGED[change]):
        padding_free(model)
    assert not any("_varstream_padding_free" in m.__dict__ for m in model.modules())
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("change", [c for c in CHANGED if c is not extra_backbone_part])
def test_changes_made_later_are_refused_at_the_call(change):
    model = padding_free(make())
    change(model)
    message = CHANGED[change].replace("encoder.layer.0", "BertLayer")
    message = message.replace("encoder.layer.1", "BertLayer")
    with pytest.raises(vs.UnsupportedModelError, match=message):
        model(**batch(FIRST_KEPT))


CONFIGS = {
    "decoder": ({"is_decoder": True}, "config.is_decoder is True"),
    "chunked": ({"chunk_size_feed_forward": 2}, "config.chunk_size_feed_forward is 2"),
    "heads": (
        {"hidden_size": 264, "num_attention_heads": 1},
        "attention.self has heads of 264, more than 256",
    ),
}


@pytest.mark.parametrize(("changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configurations_are_refused(changes, message):
    model = make(**changes)
    with pytest.raises(vs.UnsupportedModelError, match=message):
        padding_free(model)
    assert untouched(model)


def test_other_models_are_refused():
    model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    with pytest.raises(vs.UnsupportedModelError, match="GPT2Model has model type 'gpt2'; vs.padd"):
        padding_free(model)
    with pytest.raises(vs.UnsupportedModelError, match="Linear has model type None"):
        padding_free(nn.Linear(2, 2))
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    own = OwnBert(BertConfig(**small, intermediate_size=8))
    with pytest.raises(vs.UnsupportedModelError, match="the model is a test_encoder_errors.OwnBer"):
        padding_free(own)
    causal = BertLMHeadModel(BertConfig(**small, intermediate_size=8))
    with pytest.raises(vs.UnsupportedModelError, match=r"BertLMHeadModel is a head .*model\.bert"):
        padding_free(causal)
    mean = make("ElectraForMultipleChoice", summary_type="mean")
    with pytest.raises(vs.UnsupportedModelError, match="summary_type is 'mean', which reads paddi"):
        padding_free(mean)
    assert untouched(own) and untouched(causal) and untouched(mean)


@pytest.mark.parametrize("config", [True, False])
def test_modules_that_contain_an_encoder_are_refused(config):
    """With a configuration that looks like the encoder's own, and without."""
    outer = nn.Sequential(nn.Sequential(make()), nn.Linear(WIDTH, 2))
    if config:
        outer.config = outer[0][0].config
    message = r"Sequential .* contains a BertModel; pass the encoder .its submodule 0\.0."
    with pytest.raises(vs.UnsupportedModelError, match=message):
        padding_free(outer)
    assert untouched(outer)


def test_attention_implementations_of_others_are_refused():
    model = make()
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(vs.UnsupportedModelError, match="attention implementation 'paged.sdpa'"):
        padding_free(model)
    assert untouched(model)


# --- at the call ----------------------------------------------------------------------------------

ROWS, COLUMNS = FIRST_KEPT.shape
IDS = torch.full((ROWS, COLUMNS), 5)
FOUR_DIMS = torch.zeros(ROWS, 1, COLUMNS, COLUMNS, dtype=torch.float64)
CALLS = {
    "attentions": ({"output_attentions": True}, "output_attentions=True is not available"),
    "hidden": ({"output_hidden_states": True}, "output_hidden_states=True is not available"),
    "some_hidden": ({"output_hidden_states": [0]}, r"output_hidden_states=\[0\] is not available"),
    "cache": ({"use_cache": True}, "can't honour the argument use_cache"),
    "past": ({"past_key_values": object()}, "can't honour the argument past_key_values"),
    "cross": (
        {"encoder_hidden_states": torch.zeros(ROWS, 3, WIDTH)},
        "can't honour the argument encoder_hidden_states",
    ),
    "head_mask": ({"head_mask": torch.ones(2, 3)}, "can't honour the argument head_mask"),
    "causal": ({"is_causal": True}, "can't honour the argument is_causal"),
    "packed": ({"cu_seq_lens_q": torch.zeros(2)}, "can't honour the argument cu_seq_lens_q"),
    "mask_dims": ({"attention_mask": FOUR_DIMS}, r"attention_mask must have 2 dimensions \(B, S\)"),
    "mask_size": ({"attention_mask": MASK}, "attention_mask must have size 4 in dimension 0"),
    "mask_values": (
        {"attention_mask": -1e9 * (FIRST_KEPT == 0).double()},
        r"must hold 0 and 1, got -1000000000.0 \(an additive mask\?\)",
    ),
    "ids": ({"input_ids": IDS[0]}, r"input_ids must have 2 dimensions \(B, S\)"),
    "ids_dtype": ({"input_ids": IDS.double()}, "input_ids must have dtype int64, int32"),
    "nothing": ({"input_ids": None}, "exactly one of input_ids and inputs_embeds must be given"),
    "both": ({"inputs_embeds": torch.zeros(ROWS, COLUMNS, WIDTH)}, "exactly one of input_ids"),
    "types": (
        {"token_type_ids": IDS[:, :3]},
        r"token_type_ids must have size 11 in dimension 1 \(B, S\)",
    ),
    "positions": (
        {"position_ids": IDS[:2]},
        r"position_ids must have shape \(4, 11\) or \(1, 11\), got \(2, 11\)",
    ),
    "positions_columns": (
        {"position_ids": IDS[:, :3]},
        r"position_ids must have shape \(4, 11\) or \(1, 11\), got \(4, 3\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), CALLS.values(), ids=CALLS)
def test_calls_are_refused(change, message):
    model = padding_free(make())
    given = {"input_ids": IDS, "attention_mask": FIRST_KEPT} | change
    with pytest.raises(ValueError, match=message):
        model(**given)


def test_recording_by_configuration_is_refused():
    model = padding_free(make())
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states=True is not available"):
        model(**batch(FIRST_KEPT))


def test_false_flags_and_trainer_arguments_pass():
    model = padding_free(make())
    inputs = batch(FIRST_KEPT)
    flags = dict.fromkeys(("output_attentions", "output_hidden_states", "use_cache"), False)
    more = {"encoder_hidden_states": None, "num_items_in_batch": 3}
    assert torch.equal(model(**inputs, **flags, **more)[0], model(**inputs)[0])


def test_recorders_of_transformers_are_not_in_the_way():
    """Asking a padded model for hidden states leaves its hooks behind."""
    dense, _ = twins("BertForMaskedLM")
    inputs = batch(FIRST_KEPT)
    dense(**inputs, output_hidden_states=True, output_attentions=True)
    want = dense(**inputs).logits
    ours = padding_free(dense)
    got = ours(**inputs).logits
    assert torch.allclose(got[FIRST_KEPT != 0], want[FIRST_KEPT != 0])
    with pytest.raises(ValueError, match="output_attentions=True is not available"):
        ours(**inputs, output_attentions=True)
    states = restore_padding(ours)(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 3


def test_too_many_columns():
    model = padding_free(make())
    with pytest.raises(ValueError, match="at most max_position_embeddings=24 columns, got 25"):
        model(input_ids=torch.full((1, 25), 5))


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        ("DebertaV2", "SequenceClassification"),
        ("DebertaV2", "MultipleChoice"),
        ("ModernBert", "SequenceClassification"),
    ],
)
def test_position_0_must_be_real_where_it_is_read(prefix, suffix):
    """What these models give on padding there is not the tokens' alone."""
    name = f"{prefix}For{suffix}"
    model = padding_free(make(name))
    inputs = batch(MASK[:2], name)
    if name.endswith("Choice"):
        inputs = {key: value[None] for key, value in inputs.items()}
    message = f"position 0, which the pooler or head .* row 1; .* {prefix} encoder without"
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "DistilBertForTokenClassification"])
def test_labels_on_padding_are_refused(name):
    model = padding_free(make(name))
    inputs = batch(MASK, name)
    labels = torch.full(MASK.shape, -100)
    labels[1, 2] = 2
    with pytest.raises(ValueError, match="labels must be -100 on padding, got 2 at row 1, positi"):
        model(**inputs, labels=labels)


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "BertForMultipleChoice", "BertForPreTraining"]
)
def test_labels_of_rows_that_are_all_padding_are_refused(name):
    _, model = twins(name)
    inputs = batch(FIRST_KEPT)
    inputs["attention_mask"] = FIRST_KEPT.clone()
    inputs["attention_mask"][1] = 0
    rows = len(FIRST_KEPT)
    label = "next_sentence_label" if name == "BertForPreTraining" else "labels"
    given = {label: torch.zeros(rows, dtype=torch.int64)}
    if name == "BertForPreTraining":
        given["labels"] = torch.full(FIRST_KEPT.shape, -100)
        given["labels"][0, 0] = 2
    if name == "BertForMultipleChoice":  # one choice each
        inputs = {key: value[:, None] for key, value in inputs.items()}
    with pytest.raises(ValueError, match=f"{label} must be -100 .* all padding, got 0 in row 1"):
        model(**inputs, **given)
    given[label][1] = -100
    assert model(**inputs, **given).loss.isfinite()


def test_real_valued_labels_of_rows_that_are_all_padding_are_refused():
    _, model = twins("BertForSequenceClassification", num_labels=3)
    inputs = batch(FIRST_KEPT)
    inputs["attention_mask"] = FIRST_KEPT.clone()
    inputs["attention_mask"][1] = 0
    labels = torch.full((len(FIRST_KEPT), 3), -100.0, dtype=torch.float64)
    with pytest.raises(ValueError, match="labels can't be honoured: row 1 is all padding"):
        model(**inputs, labels=labels)
    assert model(**inputs).logits.isfinite().all()
