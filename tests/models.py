"""Tiny Hugging Face models, their float64 twins and dense references for streaming tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from varstream.testing import float64_twin

VOCAB = 61
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_MOE = {"output_router_logits": True, "router_aux_loss_coef": 0.3, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 48} | {
    name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")
}
# name -> the prefix of transformers' classes and what differs from SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied_bias": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_mha": ("Llama", {"num_key_value_heads": 4}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_mqa": ("Qwen3", {"head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 12,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 12,
        },
    ),
    "phi3": (
        "Phi3",
        {"sliding_window": 5, "pad_token_id": 0, "partial_rotary_factor": 0.5},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "gpt2": ("GPT2", _GPT2),
    "mixtral": ("Mixtral", _MOE | {"num_local_experts": 4, "sliding_window": 5}),
    "qwen3_moe": (
        "Qwen3Moe",
        _MOE
        | {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
}


def family_classes(family: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model's and the configuration's class, and what differs from SIZES."""
    prefix, extra = FAMILIES[family]
    config = getattr(transformers, f"{prefix}{'Text' * (prefix == 'Gemma3')}Config")
    ending = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{prefix}{ending}"), config, extra


def make_model(family: str = "llama", **changes: Any) -> Any:
    """A stock model with random weights; norm weights are random too, so that their gradients
    matter."""
    cls, config, extra = family_classes(family)
    sizes = {"vocab_size": VOCAB} if family == "gpt2" else SIZES
    model = cls(config(**(sizes | extra | changes)))
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
