"""What the planner knows of a model: sizes and which parameters are trained, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_KV = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")


class LayerGradients(NamedTuple):
    """Trained elements of one layer, by the moment its backward forms their gradients."""

    kv: int  # k and v projections
    attention: int  # q and o projections, norms
    gate_up: int
    down: int

    @property
    def rest(self) -> int:
        """What the chunk's backward forms; the rest of the layer is ``kv``."""
        return self.attention + self.gate_up + self.down

    @property
    def all(self) -> int:
        return self.kv + self.rest


@dataclass(frozen=True)
class ModelShape:
    """A causal language model of the Llama shape: ``d`` hidden, ``f`` intermediate, ``V`` classes.

    Trained sizes are numbers of elements, 0 where a part is frozen.
    """

    model_type: str
    dtype: str  # a key of ITEMSIZE
    hidden: int  # d
    intermediate: int  # f
    heads: int  # Hq
    kv_heads: int  # Hkv
    head_dim: int  # D
    vocab: int  # V; 0 when the head is no part of the job
    qk_norm: bool
    tied: bool
    window: int | None  # widest sliding window of a layer
    full_attention: bool  # some layer has no window
    max_length: int  # the positions the model was made for
    weights: int  # elements of all parameters
    trained: int  # elements of all trained parameters
    largest: int  # elements of the largest trained parameter
    embedding: int  # trained elements, and so below
    norm: int
    head: int
    layers: tuple[LayerGradients, ...]
    input_gradient: bool = False  # what the layers are given needs a gradient, trained or not

    @property
    def itemsize(self) -> int:
        """Bytes of a weight or activation."""
        return ITEMSIZE[self.dtype]

    @property
    def acc(self) -> int:
        """Bytes of an element in the accumulation dtype."""
        return max(4, self.itemsize)

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def first(self) -> int:
        """The first layer that keeps its input; the final norm counts as the last layer.

        Below it nothing is trained, so autograd records nothing.
        """
        if self.embedding or self.input_gradient:
            return 0
        for index, layer in enumerate(self.layers):
            if layer.all:
                return index
        return len(self.layers) if self.norm else len(self.layers) + 1


def describe(model: Any, *, head: bool = True) -> ModelShape:
    """Describe a causal language model that ``vs.stream`` understands.

    Args:
        model: the model, on any device; only shapes are read.
        head: whether the head is part of the job; a backbone called alone has none.

    Raises:
        UnsupportedModelError: the model has a part that streaming doesn't understand.
    """
    # Here, not above: streaming imports the planner.
    from varstream.streaming.structure import check_supported

    if not hasattr(model, "_varstream"):  # a streamed one was checked then
        check_supported(model)
    return describe_parts(model.model, model.lm_head if head else None)


def describe_parts(backbone: Any, lm_head: Any) -> ModelShape:
    """``describe`` for parts that have been checked."""
    config = backbone.config
    layers = list(backbone.layers)[: config.num_hidden_layers]
    parts = [backbone] if lm_head is None else [backbone, lm_head]
    params = {id(p): p for part in parts for p in part.parameters()}.values()
    trained = [p.numel() for p in params if p.requires_grad]
    weight = None if lm_head is None else lm_head.weight
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in layers]
    attention = layers[0].self_attn if layers else None
    return ModelShape(
        model_type=config.model_type,
        dtype=str(next(iter(params)).dtype).removeprefix("torch."),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(attention, "head_dim", config.hidden_size // config.num_attention_heads),
        vocab=0 if weight is None else weight.shape[0],
        qk_norm=hasattr(attention, "q_norm"),
        tied=weight is not None and weight is backbone.embed_tokens.weight,
        window=max((w for w in windows if w), default=None),
        full_attention=not all(windows),
        max_length=config.max_position_embeddings,
        weights=sum(p.numel() for p in params),
        trained=sum(trained),
        largest=max(trained, default=0),
        embedding=_trained(backbone.embed_tokens),
        norm=_trained(backbone.norm),
        head=0 if lm_head is None else _trained(lm_head),
        layers=tuple(_layer(layer) for layer in layers),
    )


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _layer(layer: nn.Module) -> LayerGradients:
    kv = attention = gate_up = down = 0
    for name, parameter in layer.named_parameters():
        size = parameter.numel() if parameter.requires_grad else 0
        if name.startswith(_KV):
            kv += size
        elif name.startswith("mlp.down_proj"):
            down += size
        elif name.startswith("mlp."):
            gate_up += size
        else:
            attention += size
    return LayerGradients(kv, attention, gate_up, down)


def describe_config(config: Any, dtype: torch.dtype | None = None) -> ModelShape:
    """Describe the model that a Hugging Face config makes, all of it trained.

    The model is built on the meta device: shapes only, no memory.

    Raises:
        ValueError: the config makes no model, or one that streaming doesn't understand.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from varstream.streaming.structure import UnsupportedModelError

    kind = getattr(config, "model_type", None)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"model type {kind!r} is no causal language model of transformers"
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            "config.quantization_config is set; vs.stream trains plain weights only"
        )
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # whatever a constructor does with sizes that make no sense
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"the config makes no {kind} model: {text}") from error
    return describe(model)
