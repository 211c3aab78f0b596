"""A small copy of a model's configuration that has all of its architecture.

What decides exactness is the architecture, not its size: the copy keeps the model type, the ratio
of query to key heads, every kind of layer, windows, experts, tied embeddings, biases, norms,
softcaps, multipliers and the kind of rotary embedding, and shrinks everything that only costs time.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from varstream._checks import check_int

LAYERS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY, WINDOW = 2, 2, 16, 128, 61, 5
EXPERTS, CHOSEN, RANK = 4, 2, 16
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
# Names that configurations use for one kind of size each; all are optional.
_WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "dense_intermediate_size",
    "prefix_dense_intermediate_size",
    "n_inner",
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SHARED = ("n_shared_experts", "num_shared_experts")
_RANKS = ("kv_lora_rank", "q_lora_rank")
_LATENT_DIMS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_BY_LAYER = ("layer_types", "_rope_layers", "_per_layer")  # ends of the names of such lists
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers")
_QUERY_NORMS = ("q_norm.", "q_layernorm.", "query_layernorm.")
_FUSED = ("qkv", "c_attn", "query_key_value")  # projections of q, k and v in one
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shrink_config(config: Any) -> Any:
    """A small configuration of the same architecture.

    Args:
        config: a Hugging Face configuration of a causal language model; stays as it is.

    Returns:
        One of the same class: one layer of each kind that the model has (attention type, rotary or
        not, dense or experts), at least 2 where it has 2; the ratios of query to key heads, of the
        MLP and of head dimension to width kept; a window of at most 5, a vocabulary of at most 61,
        4 experts of which a token takes 2 (8 in two groups where experts are grouped).

    Raises:
        TypeError, ValueError: a size is missing or can't be a model's.
    """
    for name in SIZES:
        check_int(f"config.{name}", getattr(config, name, None), low=1)
    small = config.to_dict()
    names = getattr(config, "attribute_map", {})  # such as hidden_size: n_embd
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    check_int("config.num_key_value_heads", kv_heads, low=1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads:
        raise ValueError(
            "config.num_attention_heads must be a multiple of num_key_value_heads, "
            f"got {heads} and {kv_heads}"
        )
    group = heads // kv_heads
    kv_heads = min(kv_heads, KV_HEADS if group < 8 else 1)
    if small.get("num_key_value_heads") is not None:
        small["num_key_value_heads"] = kv_heads
    small_heads = small[names.get("num_attention_heads", "num_attention_heads")] = group * kv_heads
    room = WIDTH // small_heads // 2 * 2  # even, for rotary pairs
    small_dim = min(head_dim, HEAD_DIM, max(room, 4))
    # Rows of all heads together against the width: 1 in Llama, often 2 in Qwen3.
    width = small_heads * small_dim * config.hidden_size / (heads * head_dim)
    width = small[names.get("hidden_size", "hidden_size")] = _multiple(width, small_heads)
    for name in _WIDTHS:
        if small.get(name):
            check_int(f"config.{name}", small[name], low=1)
            wide = _multiple(width * small[name] / config.hidden_size, 1)
            small[name] = min(wide, small[name])
    small["vocab_size"] = min(config.vocab_size, VOCABULARY)
    for name in _TOKENS:
        if small.get(name) is not None:  # padding has a row of its own without a gradient
            small[name] = small["vocab_size"] - 1 if name == "pad_token_id" else 0
    _shrink_head_dims(small, head_dim, small_dim)
    _shrink_layers(small, config, names.get("num_hidden_layers", "num_hidden_layers"))
    _shrink_experts(small)
    if small.get("rope_parameters"):
        small["rope_parameters"] = _shrunk_rotary(small["rope_parameters"], small_dim / head_dim)
    return type(config).from_dict(small)


def _multiple(size: float, of: int) -> int:
    return max(round(size / of), 1) * of


def _shrink_head_dims(small: dict[str, Any], head_dim: int, small_dim: int) -> None:
    """Also those of low-rank keys and values, and what is counted in head dimensions."""
    if small.get("head_dim") is not None:
        small["head_dim"] = small_dim
    if small.get("query_pre_attn_scalar"):
        scalar = small["query_pre_attn_scalar"] * small_dim / head_dim
        small["query_pre_attn_scalar"] = max(round(scalar), 1)
    for name in (*_RANKS, *_LATENT_DIMS):
        if small.get(name):
            small[name] = min(small[name], RANK if name in _RANKS else small_dim)
    if small.get("qk_head_dim"):
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]


def _shrink_layers(small: dict[str, Any], config: Any, key: str) -> None:
    """Few layers, but one of each kind, and a window that short documents outgrow."""
    layers = range(config.num_hidden_layers)
    lists = {
        name: value
        for name, value in small.items()
        if isinstance(value, list) and len(value) == len(layers) and name.endswith(_BY_LAYER)
    }
    dense = [_is_dense(config, i) for i in layers]
    kinds = list(zip(*lists.values(), dense, strict=True))
    picked = [kinds.index(kind) for kind in dict.fromkeys(kinds)]  # the first of each kind
    others = [i for i in layers if i not in picked]
    picked = sorted(picked + others[: max(LAYERS - len(picked), 0)])
    for name, value in lists.items():
        small[name] = [value[i] for i in picked]
    small[key] = len(picked)
    if small.get("mlp_only_layers") is not None:
        small["mlp_only_layers"] = [new for new, old in enumerate(picked) if dense[old]]
        small["decoder_sparse_step"] = 1
    for name in _DENSE_FIRST:
        if small.get(name) is not None:
            small[name] = sum(i < small[name] for i in picked)
    if getattr(config, "sliding_window", None):
        small["sliding_window"] = min(config.sliding_window, WINDOW)


def _is_dense(config: Any, layer: int) -> bool:
    """Whether a mixture of experts has a plain MLP in this layer, where its configuration says so
    by rules."""
    first = max(getattr(config, name, None) or 0 for name in _DENSE_FIRST)
    step = getattr(config, "decoder_sparse_step", None) or 1
    only = getattr(config, "mlp_only_layers", None) or []
    return layer < first or layer in only or (layer + 1) % step != 0


def _shrink_experts(small: dict[str, Any]) -> None:
    groups = small.get("n_group") or 1
    for name in _EXPERTS:
        if small.get(name):
            small[name] = min(small[name], EXPERTS if groups == 1 else 2 * EXPERTS)
    if groups > 1:
        small["n_group"], small["topk_group"] = 2, min(small.get("topk_group") or 1, 2)
    if small.get("num_experts_per_tok"):
        small["num_experts_per_tok"] = min(small["num_experts_per_tok"], CHOSEN)
    for name in _SHARED:
        if small.get(name):
            small[name] = 1


def _shrunk_rotary(rope: dict[str, Any], scale: float) -> dict[str, Any]:
    """Lists with a factor for each rotary frequency are cut to the copy's number of them; some
    models have such parameters for each type of layer."""
    shrunk = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            value = _shrunk_rotary(value, scale)
        elif isinstance(value, list) and name.endswith("_factor"):
            value = value[: round(len(value) * scale)]
        shrunk[name] = value
    return shrunk


# --- in words -------------------------------------------------------------------------------------


def describe_shrunk(config: Any, small: Any) -> dict[str, tuple[Any, Any]]:
    """What changed, by name: (the configuration's, the copy's)."""
    before, after = config.to_dict(), small.to_dict()
    pairs = {
        name: (value, after.get(name)) for name, value in before.items() if name not in _TOKENS
    }
    return {
        name: pair
        for name, pair in pairs.items()
        if pair[0] != pair[1] and all(isinstance(size, int | float) for size in pair)
    }


def describe_kept(small: Any, twin: Any) -> list[str]:
    """The architecture's features in words, read off the copy and its model ``twin``."""
    return [
        *_attention_kept(small, twin),
        *_rotary_kept(small),
        *_layer_kept(small, twin),
        *_scales_kept(small, twin),
    ]


def _attention_kept(small: Any, twin: Any) -> list[str]:
    names = [name for name, _ in twin.named_parameters()]
    heads = small.num_attention_heads
    group = heads // (getattr(small, "num_key_value_heads", None) or heads)
    if getattr(small, "multi_query", False):
        group = heads
    kept = ["as many key heads as query heads" if group == 1 else f"{group} query heads a key head"]
    if getattr(small, "kv_lora_rank", None):
        kept.append("keys and values of low rank")
    types = getattr(small, "layer_types", None) or ()
    if "sliding_attention" in types or (not types and getattr(small, "sliding_window", None)):
        kept.append("sliding window" + (" in some layers" if len(set(types)) > 1 else ""))
    kept.append("tied embeddings" if small.tie_word_embeddings else "untied head")
    biased = [
        name.split(".")[-1]
        for name, module in twin.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter)
        and "Norm" not in type(module).__name__
    ]
    kept += [f"{part} biases" for part in dict.fromkeys(biased)]
    if any(part in name for part in _QUERY_NORMS for name in names):
        kept.append("q and k norms")
    if any(part in name for part in _FUSED for name in names):
        kept.append("q, k and v in one projection")
    return kept


def _rotary_kept(small: Any) -> list[str]:
    rope = getattr(small, "rope_parameters", None) or {}
    if not rope:
        return ["no rotary embedding"]
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    types = dict.fromkeys(part.get("rope_type", "default") for part in parts)
    words = "rotary embedding: " + " and ".join(types)
    if len(parts) > 1:
        words += ", parameters by layer type"
    partial = parts[0].get("partial_rotary_factor", getattr(small, "partial_rotary_factor", 1.0))
    if partial != 1.0:
        words += f", {partial:g} of each head"
    if 0 in (getattr(small, "no_rope_layers", None) or ()):
        words += ", not in every layer"
    return [words]


def _layer_kept(small: Any, twin: Any) -> list[str]:
    kept = []
    if any("post_feedforward_layernorm" in name for name, _ in twin.named_parameters()):
        kept.append("norms after attention and MLP")
    experts = next((getattr(small, n) for n in _EXPERTS if getattr(small, n, None)), None)
    if experts and any(type(m).__name__.endswith("Experts") for m in twin.modules()):
        kept.append(f"{experts} experts, {small.num_experts_per_tok} a token")
        if getattr(small, "output_router_logits", False):
            kept.append("router loss")
    return kept


def _scales_kept(small: Any, twin: Any) -> list[str]:
    kept = []
    if hasattr(twin.get_input_embeddings(), "embed_scale"):
        kept.append("embeddings scaled")
    for name, words in (
        ("attn_logit_softcapping", "softcap of scores"),
        ("final_logit_softcapping", "softcap of logits"),
        ("embedding_multiplier", "embeddings scaled"),
        ("residual_multiplier", "residuals scaled"),
        ("logits_scaling", "logits scaled"),
        ("logit_scale", "logits scaled"),
    ):
        if getattr(small, name, None) not in (None, 1.0):
            kept.append(words)
    return kept
