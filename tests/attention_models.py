"""Tiny models under attn_implementation="oracle": dense attention with transformers' own masks."""

from __future__ import annotations

import copy

import torch
import transformers
from transformers.masking_utils import sdpa_mask

import varstream.integrations.transformers  # noqa: F401  (registers "varstream")
from varstream.testing import relative_error, worst_gradient

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
DECODERS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama_bidirectional": transformers.LlamaConfig(**SIZES, is_causal=False),
    "qwen2": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=4),
    "gemma2": transformers.Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=2.0),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **GEMMA),
    "gpt_oss": transformers.GptOssConfig(
        **SIZES,
        **EXPERTS,
        head_dim=8,
        sliding_window=4,
        rope_parameters={**YARN, "rope_theta": 1e4},
    ),
}
ENCODERS = {
    "bert": transformers.BertConfig(**SIZES),
    "modernbert": transformers.ModernBertConfig(
        **SIZES | {"num_hidden_layers": 3},
        local_attention=6,
        global_attn_every_n_layers=2,
        sep_token_id=2,
        cls_token_id=1,
    ),
}


def oracle_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_
):
    """Dense attention in the inputs' dtype under a boolean mask (B, 1, Sq, Sk)."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~attention_mask
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], 3)
        hidden = torch.nn.functional.pad(hidden, (0, 1))
    dead = hidden.all(3, keepdim=True)
    p = scores.masked_fill(hidden, -torch.inf).masked_fill(dead, 0.0).softmax(3)
    p = p.masked_fill(dead, 0.0)[..., : key.shape[2]]
    return (p @ value).transpose(1, 2), None


def oracle_mask(*args, **kwargs):
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **kwargs | skips)


transformers.AttentionInterface.register("oracle", oracle_attention)
transformers.AttentionMaskInterface.register("oracle", oracle_mask)


def build(config, implementation, auto=transformers.AutoModelForCausalLM, dtype=torch.float64):
    """A model with random weights, the same for every implementation."""
    torch.manual_seed(7)
    model = auto.from_config(copy.deepcopy(config), attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def pair(config, auto=transformers.AutoModelForCausalLM, **more):
    return [build(config, name, auto, **more) for name in ("varstream", "oracle")]


def padded(kind, batch=3, length=11):
    """Token ids and a mask (batch, length); the first sequence is whole."""
    ids = torch.randint(1, VOCAB, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    if kind == "left":
        mask[1, :4], mask[2, :10] = 0, 0
    elif kind == "right":
        mask[1, 7:], mask[2, 1:] = 0, 0
    elif kind == "both":
        mask[1, :2], mask[1, 9:], mask[2, :5] = 0, 0, 0
    elif kind == "holes":
        mask[1, 3:5], mask[2, [0, 6, 8]] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def check_models(ours, oracle, inputs, tolerance=1e-6, output=None):
    """Outputs on real positions, and every gradient of a random weighting of them."""
    results, grads = [], []
    real = inputs.get("attention_mask")
    weights = None
    for model in (ours, oracle):
        model.zero_grad(set_to_none=True)
        out = model(**inputs)
        out = out[0] if output is None else out[output]
        out = out if real is None or out.shape[:2] != real.shape else out[real.bool()]
        weights = torch.randn_like(out) if weights is None else weights
        (out * weights).sum().backward()
        results.append(out.detach())
        names = ((name.removeprefix("_orig_mod."), p) for name, p in model.named_parameters())
        grads.append({name: p.grad for name, p in names})
    assert relative_error(*results) < tolerance
    for name in [name for name in grads[0] if name.endswith("self.key.bias")]:
        # Zero in exact arithmetic: softmax doesn't see what is added to all keys alike.
        assert max(grads[i].pop(name).abs().max() for i in (0, 1)) < 1e-12
    name, error = worst_gradient(grads[0].items(), grads[1])
    assert error < tolerance, name


class Layer(torch.nn.Module):
    is_causal = True


def heads(rows=5, keys=5, batch=2):
    shapes = [(batch, 4, rows, 8), (batch, 2, keys, 8), (batch, 2, keys, 8)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]
