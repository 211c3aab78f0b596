"""Streamed models with PEFT's adapters: every gradient equals the dense adapted model's in float64,
whichever projections are adapted, the head's too."""

import copy

import peft
import pytest
import torch
from models import VOCAB, loss_and_gradients, make_model, make_twin, packed_row
from torch import nn

import varstream as vs
from varstream.streaming import UnsupportedModelError
from varstream.testing import assert_error_ratio, float64_twin, relative_error, worst_gradient

LENGTHS = [5, 1, 17, 9]


def adapt(model, targets, name=None, **options):
    """PEFT's wrapper around the model; no adapter is zero."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": targets} | options
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    if name is None:
        model = peft.get_peft_model(model, config)
    else:
        model.add_adapter(name, config)
    randomize(model)
    return model


@torch.no_grad()
def randomize(model):
    """Adapters that PEFT begins at zero."""
    for path, parameter in model.named_parameters():
        if "lora_" in path and not parameter.any():
            parameter.copy_(0.3 * torch.randn_like(parameter))


def padded_batch():
    ids, mask = torch.randint(VOCAB, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[0, 9:] = mask[1, 1:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def compare(model, inputs=None, tolerance=1e-12, streamed=None):
    """Loss and every trained parameter's gradient against the dense model with the same adapters;
    frozen parameters get none."""
    inputs = packed_row(LENGTHS) if inputs is None else inputs
    if streamed is None:
        streamed = vs.stream(copy.deepcopy(model), chunk_size=7, head_chunk_size=5)
    loss, grads = loss_and_gradients(model, **inputs, use_cache=False)
    got, got_grads = loss_and_gradients(streamed, **inputs)
    assert relative_error(got, loss) <= tolerance
    trained = {n: p.requires_grad for n, p in streamed.named_parameters()}
    assert any(trained.values())
    assert not any(g is not None and not trained[n] for n, g in got_grads.items())
    # An adapter that is not active has no gradient in the dense model, and may have zeros here.
    wanted = {n: g for n, g in grads.items() if trained[n]}
    assert any(g is not None and g.any() for g in wanted.values())
    name, error = worst_gradient(((n, got_grads[n]) for n in wanted), wanted)
    assert error <= tolerance, f"{name}: {error:.2e}"
    return streamed


# --- where adapters sit ---------------------------------------------------------------------------

MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("target", [*ATTENTION, *MLP, "lm_head", "embed_tokens"])
def test_one_projection(target):
    compare(adapt(make_twin(), [target]))


SEVERAL = {
    "attention": ("qwen3", ATTENTION, {}),
    "everything": ("llama_tied_bias", [*ATTENTION, *MLP], {}),
    "with_the_head": ("gemma2", [*ATTENTION, "lm_head"], {"ensure_weight_tying": False}),
    "scaled_head": ("granite", ["q_proj", "lm_head"], {"use_rslora": True}),
    "fused_qkv": ("phi3", ["qkv_proj", "gate_up_proj", "o_proj"], {}),
    "conv1d": ("gpt2", ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
    "beside_experts": ("mixtral", ["q_proj", "v_proj"], {}),
    "one_layer": ("smollm3", ["k_proj", "down_proj"], {"layers_to_transform": [1]}),
    "rank_by_module": (
        "olmo2",
        ATTENTION,
        {"rank_pattern": {"k_proj": 6}, "alpha_pattern": {"q_proj": 9}},
    ),
}


@pytest.mark.parametrize("form", ["packed", "padded"])
@pytest.mark.parametrize(("family", "targets", "options"), SEVERAL.values(), ids=SEVERAL)
def test_several_at_once(family, targets, options, form):
    model = make_twin(family, **({"output_router_logits": False} if family == "mixtral" else {}))
    compare(adapt(model, targets, **options), padded_batch() if form == "padded" else None)


def test_experts_weights():
    """PEFT adapts the stacked weights of experts through a parametrization of the module."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = make_twin("mixtral", output_router_logits=False)
    compare(adapt(model, ["q_proj"], target_parameters=targets))


def test_base_trained_too():
    model = adapt(make_twin(), ["k_proj", "lm_head"])
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    compare(model)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_modules_to_save(saved):
    compare(adapt(make_twin(), ["q_proj"], modules_to_save=saved))


def test_saved_norms():
    compare(adapt(make_twin(), ["q_proj"], modules_to_save=["input_layernorm", "norm"]))


def test_directions_and_magnitudes():
    """DoRA works row by row too."""
    compare(adapt(make_twin(), ["k_proj", "down_proj"], use_dora=True))


def test_trained_tokens():
    compare(adapt(make_twin(), ["q_proj"], trainable_token_indices=[3, 7, 11]))


def test_bias_trained_beside():
    compare(adapt(make_twin("llama_tied_bias"), ["q_proj"], bias="lora_only"))


# --- which adapters are active --------------------------------------------------------------------


def test_two_adapters_on_the_head():
    model = adapt(make_twin(), ["q_proj", "lm_head"])
    adapt(model, ["lm_head"], name="second", r=2, lora_alpha=1)
    model.base_model.set_adapter(["default", "second"])
    compare(model)
    model.set_adapter("second")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    compare(model)


def test_disabled_adapters():
    model = adapt(make_twin(), [*ATTENTION, "lm_head"])
    model.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    streamed = vs.stream(copy.deepcopy(model), chunk_size=7)
    inputs = packed_row(LENGTHS)
    with_adapters = streamed(**inputs).loss.detach()
    with model.disable_adapter(), streamed.disable_adapter():
        loss, grads = loss_and_gradients(model, **inputs, use_cache=False)
        got, got_grads = loss_and_gradients(streamed, **inputs)
    assert relative_error(got, loss) <= 1e-12
    assert relative_error(got, with_adapters) > 1e-3
    name = next(n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n)
    assert relative_error(got_grads[name], grads[name]) <= 1e-12
    assert all(g is None or not g.any() for n, g in got_grads.items() if n != name)


def test_merged_adapters():
    model = adapt(make_twin(), ["v_proj", "up_proj", "lm_head"])
    before = loss_and_gradients(
        vs.stream(copy.deepcopy(model), chunk_size=7), **(row := packed_row(LENGTHS))
    )[0]
    model.merge_adapter()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    streamed = compare(model, row)
    assert relative_error(streamed(**row).loss, before) <= 1e-12
    with model.disable_adapter(), streamed.disable_adapter():  # PEFT takes them out again then
        compare(model, row, streamed=streamed, tolerance=1e-11)
    whole = vs.stream(streamed.merge_and_unload(), chunk_size=7)
    assert isinstance(whole.lm_head, nn.Linear)


# --- the order of wrapping ------------------------------------------------------------------------


def test_adapters_put_on_a_streamed_model():
    base = make_twin()
    dense = adapt(copy.deepcopy(base), ["q_proj", "lm_head"])
    streamed = adapt(vs.stream(base, chunk_size=7), ["q_proj", "lm_head"])
    with torch.no_grad():
        for ours, theirs in zip(streamed.parameters(), dense.parameters(), strict=True):
            ours.copy_(theirs)
    compare(dense, streamed=streamed)


def test_undone_on_the_wrapper_or_on_its_base():
    model = adapt(make_twin(), ["q_proj"])
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    assert vs.unstream(vs.stream(model)) is model
    vs.unstream(vs.stream(model).get_base_model())
    vs.stream(model.get_base_model())
    vs.unstream(model)
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before
    with pytest.raises(ValueError, match="is not a streamed causal language model"):
        vs.unstream(model)
    streamed = vs.stream(model, chunk_size=7).unload()
    assert streamed.model.layers[0].self_attn.q_proj.__class__ is nn.Linear
    vs.unstream(streamed)


def test_saved_and_loaded(tmp_path):
    base = make_twin()
    model = vs.stream(adapt(copy.deepcopy(base), ["q_proj", "lm_head"]), chunk_size=7)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        vs.stream(base, chunk_size=7), tmp_path, is_trainable=True
    )
    row = packed_row(LENGTHS)
    want, got = (loss_and_gradients(m, **row) for m in (model, again))
    assert relative_error(got[0], want[0]) <= 1e-12
    assert worst_gradient(((n, g) for n, g in got[1].items() if g is not None), want[1])[1] <= 1e-12


def test_other_adapters_of_inputs():
    """Prompt tuning puts embeddings before the tokens; nothing else changes."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make_twin(), config)
    ids = torch.randint(VOCAB, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    compare(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})


# --- low precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_low_precision(adapters):
    """bfloat16 weights with adapters in float32, as PEFT makes them, or in bfloat16."""
    model = make_model().bfloat16()
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[*ATTENTION, "lm_head"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=adapters is torch.float32)
    randomize(model)
    exact = float64_twin(model)
    streamed = vs.stream(copy.deepcopy(model), chunk_size=7)
    ids = torch.randint(VOCAB, (1, 97))  # of fewer, rounding is a matter of luck
    row = {"input_ids": ids, "labels": ids}
    want, plain = (loss_and_gradients(m, **row, use_cache=False)[1] for m in (exact, model))
    got = loss_and_gradients(streamed, **row)[1]
    for name, grad in got.items():
        if grad is not None:
            assert grad.dtype == adapters
            assert_error_ratio(grad, plain[name], want[name], 2.0, name)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_other_variants_on_the_head_are_refused(options):
    base = make_model("llama_mha")
    base.lm_head = nn.Linear(32, VOCAB)
    model = adapt(base, ["lm_head"], **options)
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    with pytest.raises(
        UnsupportedModelError, match="lm_head's adapter 'default' is not plain LoRA"
    ):
        vs.stream(model)
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
    base = make_model("llama_mha")
    base.lm_head = nn.Linear(32, VOCAB)
    streamed = adapt(vs.stream(base), ["lm_head"], **options)
    with pytest.raises(
        UnsupportedModelError, match="lm_head's adapter 'default' is not plain LoRA"
    ):
        streamed(**packed_row([5]))


@pytest.mark.parametrize("kind", [peft.IA3Config, peft.LoHaConfig, peft.VeraConfig])
def test_other_adapters_are_refused(kind):
    options = {"feedforward_modules": []} if kind is peft.IA3Config else {}
    model = peft.get_peft_model(
        make_model("llama_mha"), kind(task_type="CAUSAL_LM", target_modules=["q_proj"], **options)
    )
    with pytest.raises(UnsupportedModelError, match="a part that streaming doesn't understand"):
        vs.stream(model)


def test_prefix_tuning_is_refused():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make_model("llama_mha"), config)
    with pytest.raises(UnsupportedModelError, match="the adapter is of type PREFIX_TUNING"):
        vs.stream(model)
