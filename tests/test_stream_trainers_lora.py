"""Trainers, unchanged, on a streamed model with LoRA adapters: adapted before streaming, after it,
and by the trainer."""

import copy

import pytest
import torch
from trainer_cases import (
    CHUNK,
    EXACT,
    FLOAT32_HEAD,
    WORDS,
    assert_same,
    both,
    documents,
    huggingface,
    saved_twin,
    train,
    trl_trainer,
)

import varstream as vs
from varstream.integrations import trl as hook
from varstream.testing import assert_exact

peft = pytest.importorskip("peft")
pytest.importorskip("trl")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    torch.manual_seed(0)
    return saved_twin(tmp_path_factory.mktemp("qwen3"), "qwen3")


def lora(**changes):
    """Adapters on every projection, with both factors random so that both have gradients."""
    options = {"target_modules": "all-linear", "init_lora_weights": False, "r": 3}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options | changes)


def adapt(model, **changes):
    torch.manual_seed(5)
    return peft.get_peft_model(model, lora(**changes))


def streamed(model):
    return vs.stream(model, chunk_size=CHUNK)


def either_order(make, model, **changes):
    """The dense run of an adapted model, and those streamed after it was adapted and before."""
    dense, adapted = both(adapt(copy.deepcopy(model), **changes), make, stream=streamed)
    return dense, adapted, train(adapt(streamed(copy.deepcopy(model)), **changes), make)


def assert_adapters_alone_moved(run, model):
    """Frozen weights have no gradients and stay, adapters of both factors in every layer move."""
    trained = {name for name in run.gradients if "lora_" in name or "modules_to_save" in name}
    assert trained == run.gradients.keys()
    assert any("layers.0.self_attn.v_proj.lora_A" in name for name in trained)
    frozen = {n.replace(".base_layer", ""): w for n, w in run.weights.items() if n not in trained}
    for name, weight in model.named_parameters():
        if (key := f"base_model.model.{name}") in frozen:
            assert torch.equal(frozen[key], weight), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": ["q_proj", "down_proj", "lm_head"]},
        {"use_rslora": True, "layers_to_transform": [0], "target_modules": ["k_proj", "up_proj"]},
    ],
    ids=["all-linear", "head", "one layer"],
)
def test_trainer(changes, qwen3, tmp_path):
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": not changes}
    dense, *others = either_order(
        lambda model: huggingface(model, tmp_path, options), qwen3, **changes
    )
    for got in others:
        assert_same(dense, got)
        if not changes:
            assert_adapters_alone_moved(got, qwen3)


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": [4, 5, 6]},
        {"use_dora": True},
    ],
    ids=["head and embedding whole", "tokens", "DoRA"],
)
def test_more_than_projections(changes, qwen3, tmp_path):
    dense, *others = either_order(lambda model: huggingface(model, tmp_path, {}), qwen3, **changes)
    for got in others:
        assert_same(dense, got)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO", "KTO"])
def test_trl(name, qwen3, tmp_path):
    """The reference is a copy of the adapter, or the model without it."""
    changes = {"beta": 0.1} if name == "GRPO" else {"packing": True} if name == "SFT" else {}
    dense, *others = either_order(lambda model: trl_trainer(name, model, tmp_path, changes), qwen3)
    for got in others:
        assert_same(dense, got, FLOAT32_HEAD)


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_the_trainer_adapts(name, qwen3, tmp_path):
    """``peft_config`` on a streamed model, with our head installed."""
    with hook.installed():
        dense, got = both(
            qwen3, lambda model: trl_trainer(name, model, tmp_path, {}, peft_config=lora())
        )
    assert_same(dense, got, EXACT)
    assert_adapters_alone_moved(got, qwen3)


def test_adapters_saved_merged_and_undone(qwen3, tmp_path):
    """What was trained on a streamed model is the plain model's adapter."""
    model = streamed(adapt(copy.deepcopy(qwen3)))
    trainer = huggingface(model, tmp_path, {})
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    ids = torch.tensor([documents(2)[1]["input_ids"]])
    with torch.no_grad():
        want = model(ids).logits
        with model.disable_adapter():
            assert not torch.equal(model(ids).logits, want)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(qwen3), tmp_path / "adapter")
        assert_exact(loaded(ids).logits, want)
        plain = vs.unstream(model).merge_and_unload()
        assert_exact(plain(ids).logits, want)
    assert want.shape[-1] == len(WORDS)
