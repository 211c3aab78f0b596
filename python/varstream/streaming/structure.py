"""What ``vs.stream`` understands of a Hugging Face causal language model: its parts, found by what
they are, and why a model is refused.

Streaming runs the model's own backbone and each layer's own forward, on chunks of rows. That is
exact where a layer mixes rows in one causal attention alone, which transformers' registry of
attention functions lets us take over, and where everything else in it works row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

STATE = "_varstream"  # the attribute that marks a streamed module
_ATTENTION = ("eager", "sdpa", "flash_attention", "flex_attention", "varstream")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODELS = "transformers.models."
# Classes of transformers' models that may stand in a layer, by the end of their names.
_NORMS = ("Norm", "NemotronLayerNorm1P")
_ROWWISE = (
    *(*_NORMS, "MLP", "Experts", "Router", "MoeBlock", "MoE"),
    *("AriaTextMoELayer", "DeepseekV2Moe", "Ernie4_5_MoeStatics", "ExaoneMoeSparseMoEBlock"),
    *("HunYuanMoEV1Gate", "HunYuanMoEV1Moe"),
)
# Others that work row by row, by the start of their full names.
_ROWWISE_HOMES = (
    "torch.nn.modules.activation.",
    "torch.nn.modules.container.",
    "torch.nn.modules.dropout.",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.normalization.RMSNorm",
    "transformers.activations.",
    "transformers.pytorch_utils.Conv1D",
    "peft.tuners.lora.layer.",
    "peft.tuners.lora.dora.DoraLinearLayer",
    "peft.utils.other.ModulesToSaveWrapper",
)
# PEFT's adapters of the input that only put embeddings before it.
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING")


class UnsupportedModelError(ValueError):
    """A model has a part that streaming doesn't understand; the message names it and the model is
    untouched."""


@dataclass(frozen=True)
class Parts:
    """A causal language model's parts."""

    model: Any  # without the wrapper of an adapter library
    backbone: Any  # embeddings, layers, final norm
    backbone_name: str
    layers: nn.ModuleList
    norm: nn.Module | None  # after the last layer
    embedding: nn.Module  # of tokens
    head: nn.Module

    @property
    def streamed(self) -> list[nn.Module]:
        """The modules whose forward streaming replaces."""
        ends = [self.norm] if self.norm is not None else []
        return [self.model, self.backbone, *self.layers, *ends]


def find_parts(model: Any) -> Parts:
    """The parts of a causal language model of transformers, or of PEFT's wrapper around one.

    Raises:
        UnsupportedModelError: it has no such parts.
    """
    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, prefix = type(wrapped).__name__, getattr(wrapped, "base_model_prefix", "")
    kind = getattr(getattr(wrapped, "config", None), "model_type", None)
    backbone = getattr(wrapped, prefix, None) if prefix else None
    head = wrapped.get_output_embeddings() if hasattr(wrapped, "get_output_embeddings") else None
    if backbone is None or head is None:
        raise UnsupportedModelError(
            f"{name} (model type {kind!r}) has no decoder with a head; pass a causal language "
            "model of transformers, the one that contains the decoder; "
            "vs.stream_layer streams a layer of your own"
        )
    children = dict(backbone.named_children())
    lists = [child for child in children.values() if isinstance(child, nn.ModuleList)]
    norms = [c for c in children.values() if type(_inside(c)).__name__.endswith(_NORMS)]
    if len(lists) != 1 or len(norms) > 1:
        raise UnsupportedModelError(
            f"{prefix} has {len(lists)} lists of layers and {len(norms)} norms; "
            "streaming understands one list of layers and at most one norm after it"
        )
    return Parts(
        wrapped,
        backbone,
        prefix,
        lists[0],
        norms[0] if norms else None,
        backbone.get_input_embeddings(),
        head,
    )


def _inside(module: Any) -> Any:
    """A module without what PEFT wrapped around it."""
    for name in ("original_module", "base_layer"):
        inner = getattr(module, name, None)
        if inner is not None:
            return inner
    return module


def attention_of(layer: nn.Module) -> tuple[str, Any]:
    """A layer's attention module and its name.

    Raises:
        UnsupportedModelError: there is none, or more than one.
    """
    found = [(n, m) for n, m in layer.named_modules() if _is_attention(m)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has {len(found)} attention modules; "
            "streaming understands layers with one"
        )
    return found[0]


def _is_attention(module: nn.Module) -> bool:
    return any(kind.__name__.endswith("Attention") for kind in type(module).__mro__)


def check_supported(model: Any) -> Parts:
    """Refuse a model that streaming would not compute exactly.

    Raises:
        UnsupportedModelError: names the first part that isn't understood.
    """
    _check_prompts(model)
    parts = find_parts(model)
    wrapped, backbone, prefix = parts.model, parts.backbone, parts.backbone_name
    _check_stock("the model", wrapped)
    if not getattr(wrapped, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{type(wrapped).__name__} doesn't take its attention from transformers' registry"
        )
    _check_stock(prefix, backbone)
    check_head(parts.head)
    implementation = getattr(wrapped.config, "_attn_implementation", None) or "eager"
    if not implementation.startswith(_ATTENTION):
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} isn't one that streaming replaces exactly"
        )
    for child in wrapped.children():
        if child not in (backbone, parts.head):
            raise UnsupportedModelError(
                f"{_name_of(wrapped, child)} is a part that streaming doesn't understand"
            )
    for name, child in backbone.named_children():
        known = (nn.Embedding, nn.Dropout)
        rotary = type(child).__name__.endswith("RotaryEmbedding")
        if (
            child not in (parts.layers, parts.norm)
            and not rotary
            and not isinstance(_inside(child), known)
        ):
            raise UnsupportedModelError(
                f"{prefix}.{name} is a part that streaming doesn't understand"
            )
    for i, layer in enumerate(parts.layers):
        _check_layer(f"{prefix}.{_name_of(backbone, parts.layers)}.{i}", layer)
    return parts


def _check_prompts(model: Any) -> None:
    """Refuse PEFT's adapters of the input that fill a cache or have a loss of their own."""
    config = getattr(model, "active_peft_config", None)
    kind = getattr(config, "peft_type", None)
    kind = getattr(kind, "value", kind)
    if getattr(config, "is_prompt_learning", False) and kind not in _PROMPTS:
        raise UnsupportedModelError(
            f"the adapter is of type {kind}; of those that change the input streaming understands "
            f"{', '.join(_PROMPTS)} only"
        )


def active_head(head: Any) -> Any:
    """The head that is called: of the copies that PEFT made to be trained, the active one."""
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    if head.disable_adapters or not head.active_adapters:
        return head.original_module
    return copies[head.active_adapters[0]]


def check_head(head: Any) -> None:
    """Refuse a head whose weights are not all there is to it: its module is never called."""
    if reason := head_refusal(head):
        raise UnsupportedModelError(reason)


def head_refusal(head: Any) -> str | None:
    """What more there is to a head than its weights, None for nothing."""
    active = active_head(head)
    base = getattr(active, "base_layer", active)  # of a LoRA adapter
    if type(base) is not nn.Linear:
        return f"lm_head is a {type(base).__name__}, not a plain nn.Linear"
    if any(getattr(m, hook) for m in (head, active, base) for hook in _HOOKS):
        return "lm_head has hooks, which would not fire on a streamed model"
    if base is active:
        return None
    for name in active.active_adapters:
        if name not in active.lora_A:
            continue
        if active.lora_variant.get(name) is not None or active.lora_B[name].bias is not None:
            return f"lm_head's adapter {name!r} is not plain LoRA (DoRA or a bias, for example)"
    return None


def _name_of(parent: nn.Module, child: Any) -> str:
    return next(name for name, module in parent.named_children() if module is child)


def _check_stock(name: str, module: nn.Module) -> None:
    """Refuse a forward of the user's own where streaming takes the forward's place."""
    home = f"{type(module).__module__}.{type(module).__qualname__}"
    if not home.startswith(_MODELS):
        raise UnsupportedModelError(f"{name} is a {home}, not a class of {_MODELS[:-1]}")
    if "_varstream_head" in module.__dict__:
        raise UnsupportedModelError(
            f"{name} has a fused head; call unfuse_head first (a streamed model needs none)"
        )
    if "forward" in module.__dict__ and not hasattr(module, STATE):
        raise UnsupportedModelError(
            f"{name} has a forward set on the instance; call vs.stream first and wrap afterwards"
        )


def _check_layer(name: str, layer: nn.Module) -> None:
    _check_stock(name, layer)
    path, attention = attention_of(layer)
    _check_stock(f"{name}.{path}", attention)
    if not getattr(attention, "is_causal", True):
        raise UnsupportedModelError(f"{name}.{path} isn't causal")
    for inner, module in layer.named_modules():
        if module is layer or module is attention:
            continue
        home = f"{type(module).__module__}.{type(module).__qualname__}"
        stock = home.startswith(_MODELS) and home.endswith(_ROWWISE)
        if not stock and not home.startswith(_ROWWISE_HOMES):
            raise UnsupportedModelError(
                f"{name}.{inner} is a {home}, a part that streaming doesn't understand"
            )
