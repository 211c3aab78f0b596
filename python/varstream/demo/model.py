"""The demo's model: Llama with grouped-query attention, small enough for a laptop's CPU."""

from __future__ import annotations

from typing import Any

import torch

from varstream.demo.settings import Settings


def make_model(settings: Settings, vocab_size: int, device: torch.device) -> Any:
    """A ``LlamaForCausalLM`` with random weights, ready to train."""
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
    model = LlamaForCausalLM(config).to(device)
    dtype = weight_dtype(settings, device)
    for parameter in model.parameters():  # buffers, the rotary frequencies, stay float32
        parameter.data = parameter.data.to(dtype)
    return model.train()


def weight_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The dtype asked for, else the one that attention's kernels take where there are any."""
    if settings.dtype is not None:
        return getattr(torch, settings.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def describe(model: Any) -> str:
    """One line: layers, width, heads, vocabulary, parameters, dtype."""
    config = model.config
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"Llama, {config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key heads, "
        f"vocabulary {config.vocab_size}, {millions:.1f} M parameters, "
        f"{str(model.dtype).removeprefix('torch.')}"
    )
