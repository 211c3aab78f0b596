"""Tiny Hugging Face models, their float64 twins and dense references for streaming tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from varstream.testing import float64_twin

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama_tied_bias": (
        LlamaForCausalLM,
        LlamaConfig,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_mha": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen3_mqa": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8, "num_key_value_heads": 1}),
}


def make_model(family: str = "llama", **changes: Any) -> Any:
    """A stock model with random weights; norm weights are random too, so that their gradients
    matter."""
    cls, config, extra = FAMILIES[family]
    model = cls(config(**(SIZES | extra | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_twin(family: str = "llama", **changes: Any) -> Any:
    """Its float64 twin."""
    return float64_twin(make_model(family, **changes))


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The loss and the gradient of every parameter after one backward."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def packed_row(lengths: list[int]) -> dict[str, torch.Tensor]:
    """One row of packed documents with position ids; the first label of each document is not
    trained."""
    total = sum(lengths)
    ids = torch.randint(VOCAB, (1, total))
    labels = ids.clone()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels[positions == 0] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}
