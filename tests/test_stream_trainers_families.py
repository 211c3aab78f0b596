"""Trainers on streamed models of families that differ from Llama: softcaps and windows, routed
experts with their loss, learned positions and tied embeddings."""

import pytest
import torch
from models import SIZES
from trainer_cases import IDS, assert_same, both, huggingface, saved, trl_trainer
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

TOLERANCE = 2e-5  # shipped classes in float32
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        SIZES
        | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
        # sdpa drops the softcap
        | {"attn_logit_softcapping": 3.0, "attn_implementation": "eager"}
        | {"final_logit_softcapping": 4.0},
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        SIZES | {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1},
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1},
    ),
}


def make(family, path, **changes):
    torch.manual_seed(0)
    cls, config, sizes = FAMILIES[family]
    model = cls(config(**sizes | IDS | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return saved(model, path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["Trainer", "SFT"])
def test_families(family, name, tmp_path):
    changes = {"gradient_accumulation_steps": 2}

    def trainer(model):
        if name == "Trainer":
            return huggingface(model, tmp_path, changes)
        return trl_trainer(name, model, tmp_path, changes | {"packing": True, "max_length": 24})

    dropout = NO_DROPOUT if family == "gpt2" else {}
    dense, streamed = both(make(family, tmp_path / "model", **dropout), trainer)
    assert_same(dense, streamed, TOLERANCE)
    assert ("aux_loss" in streamed.logs[0]) == (family == "mixtral" and name == "SFT")


@pytest.mark.parametrize("family, name", [("gpt2", "DPO"), ("gemma2", "GRPO"), ("mixtral", "KTO")])
def test_preferences(family, name, tmp_path):
    """These trainers set dropout to zero themselves."""
    dense, streamed = both(
        make(family, tmp_path / "model"), lambda model: trl_trainer(name, model, tmp_path, {})
    )
    assert_same(dense, streamed, TOLERANCE)
