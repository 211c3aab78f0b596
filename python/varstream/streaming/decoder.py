"""What a Hugging Face decoder layer of the Llama shape is made of, as the two functions
``stream_layer`` wants.

A layer is understood by its parts (norm, q/k/v/o projections with optional q and k norms, norm,
gated MLP, two residuals). Anything else is refused by name before the model is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from varstream.streaming.layer import Attend

MODEL_TYPES = ("llama", "qwen2", "qwen3")
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_ATTENTION = ("eager", "sdpa", "flash_attention", "flex_attention", "varstream")


class UnsupportedModelError(ValueError):
    """A model has a part that streaming doesn't understand; the message names it and the model is
    untouched."""


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines ``(n, D)`` of all packed rows."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rotate x ``(c, H, D)`` whose packed row numbers are ``rows`` (c,)."""
        cos, sin = self.cos[rows].unsqueeze(1), self.sin[rows].unsqueeze(1)
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin


@dataclass(frozen=True)
class DecoderLayer:
    """The two halves of one layer; ``rows`` are packed row numbers, which index the rotary
    tables."""

    layer: Any
    rotary: Rotary

    def kv(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x (c, d) to k and v (c, Hkv, D)."""
        attn = self.layer.self_attn
        h = self.layer.input_layernorm(x)
        k = attn.k_proj(h).unflatten(-1, (-1, attn.head_dim))
        if hasattr(attn, "k_norm"):
            k = attn.k_norm(k)
        return self.rotary.apply(k, rows), attn.v_proj(h).unflatten(-1, (-1, attn.head_dim))

    def rest(self, x: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        """x (c, d) to the layer's output (c, d)."""
        attn = self.layer.self_attn
        q = attn.q_proj(self.layer.input_layernorm(x)).unflatten(-1, (-1, attn.head_dim))
        if hasattr(attn, "q_norm"):
            q = attn.q_norm(q)
        x = x + attn.o_proj(attend(self.rotary.apply(q, rows)).flatten(1))
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))

    def attention(self) -> dict[str, Any]:
        """Keywords of ``varlen_attention`` for this layer; Hugging Face counts the row itself in
        its window."""
        window = getattr(self.layer.self_attn, "sliding_window", None)
        options: dict[str, Any] = {"softmax_scale": self.layer.self_attn.scaling}
        return options | ({"window": (window - 1, 0)} if window else {})


def check_supported(model: nn.Module) -> None:
    """Refuse a model that streaming would not compute exactly.

    Raises:
        UnsupportedModelError: names the first part that isn't understood.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{type(model).__name__} has model type {kind!r}; "
            f"vs.stream understands {', '.join(MODEL_TYPES)}; "
            "vs.stream_layer streams a layer of your own"
        )
    backbone, head = getattr(model, "model", None), getattr(model, "lm_head", None)
    if backbone is None or not hasattr(backbone, "layers"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder 'model.layers'; "
            "pass the causal language model that contains it"
        )
    _check_stock("the model", model, kind)
    _check_stock("model", backbone, kind)
    _check_linear("lm_head", head)
    check_bypassed("lm_head", head)
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if not implementation.startswith(_ATTENTION):
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} isn't one that streaming replaces exactly"
        )
    if dropout := getattr(config, "attention_dropout", 0.0):
        raise UnsupportedModelError(
            f"config.attention_dropout is {dropout}; "
            "streaming recomputes attention and needs it to be 0.0"
        )
    parts = {name for name, _ in backbone.named_children()}
    if unknown := parts - {"embed_tokens", "layers", "norm", "rotary_emb"}:
        raise UnsupportedModelError(
            f"model.{min(unknown)} is a part that streaming doesn't understand"
        )
    for i, layer in enumerate(backbone.layers):
        _check_layer(f"model.layers.{i}", layer, kind)


def check_bypassed(name: str, module: Any) -> None:
    """Refuse hooks on a module whose parts streaming calls in its place: they would never fire."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, hook) for hook in hooks):
        raise UnsupportedModelError(f"{name} has hooks, which would not fire on a streamed model")
    if dropout := getattr(module, "attention_dropout", 0.0):
        raise UnsupportedModelError(
            f"{name}.attention_dropout is {dropout}; "
            "streaming recomputes attention and needs it to be 0.0"
        )


def _check_stock(name: str, module: nn.Module, kind: str) -> None:
    """Refuse a forward of the user's own where streaming takes the forward's place."""
    if not type(module).__module__.startswith(f"transformers.models.{kind}."):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__module__}.{type(module).__qualname__}, "
            f"not a class of transformers.models.{kind}"
        )
    if "_varstream_head" in module.__dict__:
        raise UnsupportedModelError(
            f"{name} has a fused head; call unfuse_head first (a streamed model needs none)"
        )
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"{name} has a forward set on the instance; call vs.stream first and wrap afterwards"
        )


def _check_linear(name: str, module: Any) -> None:
    if type(module) is not nn.Linear:
        raise UnsupportedModelError(f"{name} is a {type(module).__name__}, not a plain nn.Linear")


def _check_layer(name: str, layer: nn.Module, kind: str) -> None:
    _check_stock(name, layer, kind)
    parts = dict(layer.named_children())
    for part in sorted(_LAYER_PARTS ^ parts.keys()):
        state = (
            "is missing" if part in _LAYER_PARTS else "is a part that streaming doesn't understand"
        )
        raise UnsupportedModelError(f"{name}.{part} {state}")
    attn, mlp = parts["self_attn"], parts["mlp"]
    _check_stock(f"{name}.self_attn", attn, kind)
    check_bypassed(f"{name}.self_attn", attn)
    known = {*_PROJECTIONS, "q_norm", "k_norm"}
    for part, module in attn.named_children():
        if part not in known:
            raise UnsupportedModelError(
                f"{name}.self_attn.{part} is a part that streaming doesn't understand"
            )
        if part in _PROJECTIONS:
            _check_linear(f"{name}.self_attn.{part}", module)
    for attribute in (*_PROJECTIONS, "head_dim", "scaling"):
        if not hasattr(attn, attribute):
            raise UnsupportedModelError(f"{name}.self_attn.{attribute} is missing")
    window = getattr(attn, "sliding_window", None)
    if window is not None and window < 1:
        raise UnsupportedModelError(
            f"{name}.self_attn.sliding_window is {window}; it must be None or at least 1"
        )
    for part, module in mlp.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise UnsupportedModelError(f"{name}.mlp.{part} is a Dropout with p = {module.p}")
        if part.endswith("_proj"):
            _check_linear(f"{name}.mlp.{part}", module)
