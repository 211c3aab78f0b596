"""Which Hugging Face encoders are understood: where the parts of their layers are, how their
embeddings number positions, what they return.

A model is checked part by part before it is touched, and its layers again at each call, so that a
part that was exchanged or hooked meanwhile is refused rather than left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from varstream.encoder.layer import LayerParts
from varstream.ops.attention_call import MAX_HEAD_DIM
from varstream.streaming import UnsupportedModelError

ATTENTION = ("eager", "sdpa", "flash_attention", "flex_attention", "varstream")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GELU = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
}
# Types of a layer's parts by the last word of their LayerParts field.
_TYPES: dict[str, type[nn.Module]] = {"dropout": nn.Dropout, "norm": nn.LayerNorm}


@dataclass(frozen=True)
class Family:
    """How one model type of transformers spells the parts of its encoder.

    Attributes:
        kind: the module ``transformers.models.<kind>``.
        prefix: what its class names start with.
        layers: path from the backbone to the list of layers.
        output: class of ``transformers.modeling_outputs`` that the backbone returns.
        attention: path from a layer to its self-attention.
        heads: name of the number of heads there.
        activation: path from a layer to its activation.
        parts: path from a layer to each module of ``LayerParts``.
    """

    kind: str
    prefix: str
    layers: str
    output: str
    attention: str
    heads: str
    activation: str
    parts: dict[str, str]


_BERT_PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_dropout": "attention.self.dropout",
    "out": "attention.output.dense",
    "out_dropout": "attention.output.dropout",
    "out_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_dropout": "output.dropout",
    "ffn_norm": "output.LayerNorm",
}
_DISTILBERT_PARTS = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_dropout": "attention.dropout",
    "out": "attention.out_lin",
    "out_norm": "sa_layer_norm",
    "ffn_in": "ffn.lin1",
    "ffn_out": "ffn.lin2",
    "ffn_dropout": "ffn.dropout",
    "ffn_norm": "output_layer_norm",
}


def _bert_like(kind: str, prefix: str, output: str) -> Family:
    return Family(
        kind,
        prefix,
        "encoder.layer",
        output,
        "attention.self",
        "num_attention_heads",
        "intermediate.intermediate_act_fn",
        _BERT_PARTS,
    )


_POOLED = "BaseModelOutputWithPoolingAndCrossAttentions"
FAMILIES = {
    "bert": _bert_like("bert", "Bert", _POOLED),
    "roberta": _bert_like("roberta", "Roberta", _POOLED),
    "xlm-roberta": _bert_like("xlm_roberta", "XLMRoberta", _POOLED),
    "electra": _bert_like("electra", "Electra", "BaseModelOutputWithPastAndCrossAttentions"),
    "distilbert": Family(
        "distilbert",
        "DistilBert",
        "transformer.layer",
        "BaseModelOutput",
        "attention",
        "n_heads",
        "ffn.activation",
        _DISTILBERT_PARTS,
    ),
}


def family_of(model: Any) -> Family:
    """The family of a model or its backbone.

    Raises:
        UnsupportedModelError: its model type is none that is understood.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"{type(model).__name__} has model type {kind!r}; "
            f"vs.padding_free understands {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def layers_of(backbone: nn.Module, family: Family) -> Sequence[nn.Module]:
    """The backbone's layers, first to last."""
    return list(backbone.get_submodule(family.layers).children())


# --- checks ---------------------------------------------------------------------------------------


def check_backbone(backbone: nn.Module, family: Family) -> None:
    """Refuse a backbone that would not compute the same on packed rows.

    Raises:
        UnsupportedModelError: names the first part that isn't understood.
    """
    check_stock("the encoder", backbone, family)
    config: Any = backbone.config
    for name in ("is_decoder", "add_cross_attention", "is_causal", "chunk_size_feed_forward"):
        if value := getattr(config, name, False):
            raise UnsupportedModelError(
                f"config.{name} is {value!r}; vs.padding_free runs plain bidirectional encoders"
            )
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if not implementation.startswith(ATTENTION):
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} isn't one that vs.padding_free replaces "
            "exactly"
        )
    stack = family.layers.split(".")[0]
    known = {"embeddings", "embeddings_project", stack, "pooler"}
    for name, _ in backbone.named_children():
        if name not in known:
            raise UnsupportedModelError(f"{name} is a part that vs.padding_free doesn't understand")
    check_stack(backbone, family)
    for i, layer in enumerate(layers_of(backbone, family)):
        parts_of(f"{family.layers}.{i}", layer, family)


def check_stack(backbone: nn.Module, family: Family) -> None:
    """Refuse a stack of layers whose own forward, which is bypassed, is not the stock one."""
    stack = family.layers.split(".")[0]
    module = backbone.get_submodule(stack)
    check_stock(stack, module, family)
    _check_hooks(stack, module)


def check_stock(name: str, module: nn.Module, family: Family) -> None:
    """Refuse a class of somebody else's, or a forward set on the instance."""
    if not type(module).__module__.startswith(f"transformers.models.{family.kind}."):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__module__}.{type(module).__qualname__}, "
            f"not a class of transformers.models.{family.kind}"
        )
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"{name} has a forward set on the instance; call vs.padding_free first and wrap "
            "afterwards"
        )


def _check_hooks(name: str, module: nn.Module) -> None:
    """Refuse hooks on a module that is bypassed: they would never fire.

    transformers' own recorders of hidden states and attentions stay on a model once either has been
    asked for; they do nothing unless it is asked for again, which a padding-free model refuses.
    """
    for hooks in _HOOKS:
        for hook in getattr(module, hooks).values():
            if getattr(hook, "__name__", "") != "output_capturing_hook":
                raise UnsupportedModelError(
                    f"{name} has hooks, which would not fire on a padding-free model"
                )


def parts_of(name: str, layer: nn.Module, family: Family) -> LayerParts:
    """The parts of one layer, checked.

    Raises:
        UnsupportedModelError: names the first part that isn't understood.
    """
    modules = dict(layer.named_modules())
    parts: dict[str, Any] = {
        field: _part(f"{name}.{path}", modules.pop(path, None), field)
        for field, path in family.parts.items()
    }
    for path, module in modules.items():
        if not path or path.startswith(family.activation):
            continue  # the layer itself is called, so its hooks fire
        if not any(known.startswith(f"{path}.") for known in family.parts.values()):
            raise UnsupportedModelError(
                f"{name}.{path} is a part that vs.padding_free doesn't understand"
            )
        check_stock(f"{name}.{path}", module, family)
        _check_hooks(f"{name}.{path}", module)
    attention: Any = modules[family.attention]
    heads = getattr(attention, family.heads)
    head_dim = parts["query"].out_features // heads
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedModelError(
            f"{name}.{family.attention} has heads of {head_dim}, more than {MAX_HEAD_DIM}"
        )
    activation = _activation(name, layer, family)
    dropout = parts.pop("attention_dropout")
    return LayerParts(
        heads=heads,
        scaling=attention.scaling,
        attention_dropout=dropout.p if attention.training else 0.0,
        activation=activation,
        gelu=_GELU.get(type(activation).__name__),
        out_dropout=parts.pop("out_dropout", None),
        **parts,
    )


def _part(name: str, module: nn.Module | None, field: str) -> nn.Module:
    """One of a layer's innermost modules, checked: layers call their parts, or only their weights,
    in the place of the modules between."""
    expected = _TYPES.get(field.split("_")[-1], nn.Linear)
    if module is None or type(module) is not expected:
        got = "missing" if module is None else f"a {type(module).__name__}"
        raise UnsupportedModelError(f"{name} is {got}, not a plain nn.{expected.__name__}")
    if "forward" in module.__dict__:
        raise UnsupportedModelError(f"{name} has a forward set on the instance")
    _check_hooks(name, module)
    return module


def _activation(name: str, layer: nn.Module, family: Family) -> Callable[[Tensor], Tensor]:
    """The layer's activation; transformers' and torch's own are known to be elementwise."""
    owner, _, attribute = family.activation.rpartition(".")
    activation = getattr(layer.get_submodule(owner), attribute)
    module = getattr(type(activation), "__module__", "")
    if isinstance(activation, nn.Module):
        if not module.startswith(("transformers.activations", "torch.nn.modules.activation")):
            raise UnsupportedModelError(
                f"{name}.{family.activation} is a {module}.{type(activation).__qualname__}, "
                "not an activation of transformers or torch"
            )
        if any(getattr(activation, hooks) for hooks in _HOOKS):
            raise UnsupportedModelError(
                f"{name}.{family.activation} has hooks, which would not fire on a padding-free "
                "model"
            )
    elif getattr(activation, "__module__", None) not in ("torch.nn.functional", "torch._C._nn"):
        raise UnsupportedModelError(
            f"{name}.{family.activation} is {activation!r}, not an activation of transformers or "
            "torch"
        )
    return activation


# --- positions and embeddings ---------------------------------------------------------------------


def default_positions(
    backbone: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """Position numbers of a padded batch, (B, S) or (1, S) int64, by the model's own rule: the
    column, or for RoBERTa's family the count of tokens that aren't the padding token."""
    embeddings = backbone.embeddings
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        if input_ids is not None:
            return embeddings.create_position_ids_from_input_ids(input_ids, embeddings.padding_idx)
        return embeddings.create_position_ids_from_inputs_embeds(
            inputs_embeds, embeddings.padding_idx
        )
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    seqlen, most = given.shape[1], embeddings.position_embeddings.num_embeddings
    if seqlen > most:
        raise ValueError(
            f"the batch must have at most max_position_embeddings={most} columns, got {seqlen}"
        )
    return torch.arange(seqlen, device=given.device)[None]


def embed(backbone: Any, **columns: Tensor | None) -> Tensor:
    """Packed columns (total, ...) to packed embeddings (total, d), by the model's own module."""
    given = {name: c[None] for name, c in columns.items() if c is not None}
    given.setdefault("input_ids", None)  # type: ignore[arg-type]
    x = backbone.embeddings(**given)
    if hasattr(backbone, "embeddings_project"):
        x = backbone.embeddings_project(x)
    return x[0]
