"""The demo's model: Llama with grouped-query attention, small enough for a laptop's CPU."""

from __future__ import annotations

from typing import Any

import torch

from varstream.demo.settings import Settings


def make_model(settings: Settings, vocab_size: int, device: torch.device) -> Any:
    """A ``LlamaForCausalLM`` with random weights, ready to train; float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 11 // 4,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=max(settings.length_cap, settings.max_length),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(config)
    return model.to(device=device, dtype=torch.float32).train()


def describe(model: Any) -> str:
    """One line: layers, width, heads, vocabulary, parameters."""
    config = model.config
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"Llama, {config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key heads, "
        f"vocabulary {config.vocab_size}, {millions:.1f} M parameters, float32"
    )
