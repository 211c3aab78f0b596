"""A small copy of a model's configuration that has all of its architecture.

What decides exactness is the architecture, not its size: the copy keeps the model type, the ratio
of query to key heads, windows, tied embeddings, biases, norms and the kind of rotary embedding, and
shrinks everything that only costs time.
"""

from __future__ import annotations

from typing import Any

from varstream._checks import check_int

LAYERS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY, WINDOW = 2, 2, 16, 128, 61, 5
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def shrink_config(config: Any) -> Any:
    """A small configuration of the same architecture.

    Args:
        config: a Hugging Face configuration of a Llama, Qwen2 or Qwen3 model; stays as it is.

    Returns:
        One of the same class: at most 2 layers (one of each attention type the model has), the
        ratios of query to key heads, of the MLP and of head dimension to width kept, a window of
        at most 5, a vocabulary of at most 61.

    Raises:
        TypeError, ValueError: a size is missing or can't be a model's.
    """
    for name in SIZES:
        check_int(f"config.{name}", getattr(config, name, None), low=1)
    small = config.to_dict()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads:
        raise ValueError(
            "config.num_attention_heads must be a multiple of num_key_value_heads, "
            f"got {heads} and {kv_heads}"
        )
    group = heads // kv_heads
    small["num_key_value_heads"] = min(kv_heads, KV_HEADS if group < 8 else 1)
    small["num_attention_heads"] = group * small["num_key_value_heads"]
    room = WIDTH // small["num_attention_heads"] // 2 * 2  # even, for rotary pairs
    small_dim = min(head_dim, HEAD_DIM, max(room, 4))
    if small.get("head_dim") is not None:
        small["head_dim"] = small_dim
    # Rows of all heads together against the width: 1 in Llama, often 2 in Qwen3.
    across = small["num_attention_heads"] * small_dim
    width = across * config.hidden_size / (heads * head_dim)
    small["hidden_size"] = _multiple(width, small["num_attention_heads"])
    wide = small["hidden_size"] * config.intermediate_size / config.hidden_size
    small["intermediate_size"] = min(_multiple(wide, 1), config.intermediate_size)
    small["vocab_size"] = min(config.vocab_size, VOCABULARY)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if small.get(name) is not None:  # padding has a row of its own without a gradient
            small[name] = small["vocab_size"] - 1 if name == "pad_token_id" else None
    _shrink_layers(small, config)
    _shrink_rotary(small, head_dim, small_dim)
    return type(config).from_dict(small)


def _multiple(size: float, of: int) -> int:
    return max(round(size / of), 1) * of


def _shrink_layers(small: dict[str, Any], config: Any) -> None:
    """Few layers, but one of each attention type, and a window that short documents outgrow."""
    count = min(config.num_hidden_layers, LAYERS)
    types = getattr(config, "layer_types", None)
    if types is not None:
        picked = list(dict.fromkeys(types))
        small["layer_types"] = picked + types[len(picked) : max(count, len(picked))]
        count = len(small["layer_types"])
    small["num_hidden_layers"] = count
    if getattr(config, "sliding_window", None):
        small["sliding_window"] = min(config.sliding_window, WINDOW)


def _shrink_rotary(small: dict[str, Any], head_dim: int, small_dim: int) -> None:
    """Lists with a factor for each rotary frequency are cut to the copy's number of them."""
    rope = small.get("rope_parameters") or {}
    small["rope_parameters"] = {
        name: value[: small_dim // 2]
        if isinstance(value, list) and len(value) == head_dim // 2
        else value
        for name, value in rope.items()
    }


def describe_shrunk(config: Any, small: Any) -> dict[str, tuple[Any, Any]]:
    """What changed, by name: (the configuration's, the copy's)."""
    names = (*SIZES, "head_dim", "sliding_window")
    pairs = {name: (getattr(config, name, None), getattr(small, name, None)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe_kept(small: Any, twin: Any) -> list[str]:
    """The architecture's features in words, read off the copy and its model ``twin``."""
    heads, kv_heads = small.num_attention_heads, small.num_key_value_heads
    names = [name for name, _ in twin.named_parameters()]
    group = heads // kv_heads
    kept = ["as many key heads as query heads" if group == 1 else f"{group} query heads a key head"]
    types = set(getattr(small, "layer_types", None) or ())
    if "sliding_attention" in types:
        kept.append("sliding window" + (" in some layers" if len(types) > 1 else ""))
    kept.append("tied embeddings" if small.tie_word_embeddings else "untied head")
    kept += [f"{part} biases" for part in ("q_proj", "o_proj", "down_proj") if _has(names, part)]
    if any("q_norm" in name for name in names):
        kept.append("q and k norms")
    rope = getattr(small, "rope_parameters", None) or {}
    return [*kept, f"rotary embedding: {rope.get('rope_type', 'default')}"]


def _has(names: list[str], part: str) -> bool:
    return any(name.endswith(f"{part}.bias") for name in names)
