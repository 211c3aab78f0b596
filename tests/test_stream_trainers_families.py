"""Trainers on streamed models of families that differ from Llama: softcaps and windows, routed
experts with their loss, learned positions and tied embeddings, multipliers."""

import pytest
import torch
from trainer_cases import FLOAT32_HEAD, assert_same, both, huggingface, saved_twin, trl_trainer

pytest.importorskip("trl")
pytestmark = pytest.mark.slow


def model_of(family, path, **changes):
    torch.manual_seed(0)
    return saved_twin(path / "model", family, **changes)


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "gpt2"])
@pytest.mark.parametrize("name", ["Trainer", "SFT"])
def test_families(family, name, tmp_path):
    changes = {"gradient_accumulation_steps": 2}

    def make(model):
        if name == "Trainer":
            return huggingface(model, tmp_path, changes)
        return trl_trainer(name, model, tmp_path, changes | {"packing": True, "max_length": 24})

    dense, streamed = both(model_of(family, tmp_path), make)
    assert_same(dense, streamed, FLOAT32_HEAD)  # the loss of routers is float32 too
    assert ("aux_loss" in streamed.logs[0]) == (family == "mixtral" and name == "SFT")


@pytest.mark.parametrize(
    "family, name", [("gpt2", "DPO"), ("gemma2", "GRPO"), ("mixtral", "KTO"), ("granite", "SFT")]
)
def test_preferences(family, name, tmp_path):
    """Dropout of the configuration is one that DPO's trainer sets to zero itself."""
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1} if family == "gpt2" else {}
    # a reference model loaded from disk multiplies its experts in a way that knows no float64
    changes = {"precompute_ref_log_probs": True} if family == "mixtral" else {}
    dense, streamed = both(
        model_of(family, tmp_path, **dropout),
        lambda model: trl_trainer(name, model, tmp_path, changes),
    )
    assert_same(dense, streamed, FLOAT32_HEAD)
