"""What the planner knows of a model: sizes, which parameters are trained and what its layers
allocate; no tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from varstream.planner.knee import Product
from varstream.planner.trace import AttentionShape, Trace

MODES = ("full", "lora", "frozen")
ALL_LINEAR = "all-linear"
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Size(NamedTuple):
    """Parameters: how many elements, how many bytes."""

    elements: int = 0
    bytes: int = 0

    def plus(self, other: Size) -> Size:
        return Size(self.elements + other.elements, self.bytes + other.bytes)


NOTHING = Size()


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer, or the norm after the last one."""

    trained: Size
    trace: Trace
    products: tuple[Product, ...] = ()


@dataclass(frozen=True)
class HeadShape:
    """The projection to V classes."""

    vocab: int
    trained: Size  # 0 where frozen
    tied: bool  # its weight is the embedding's
    softcap: bool = False
    rank: int = 0  # of a low-rank adapter, whose columns join the hidden states and the weight


@dataclass(frozen=True)
class ModelShape:
    """A causal language model of width ``d``; trained sizes are 0 where a part is frozen."""

    model_type: str
    dtype: str  # of what flows from layer to layer; a key of ITEMSIZE
    hidden: int  # d
    max_length: int  # the positions the model was made for
    weights: Size  # all parameters
    trained: Size
    largest: Size  # the trained parameter with the most bytes
    embedding: Size  # trained, with everything else before the layers
    layers: tuple[LayerShape, ...]
    norm: LayerShape | None
    head: HeadShape | None  # None where the head is no part of the job
    row_bytes: float  # a token: rotary tables and what else the backbone keeps beside the layers
    router_bytes: int = 0  # a token: the logits of all routers, where their loss is asked for
    looks_up: bool = False  # the first layer's input comes from the embedding and isn't kept
    input_gradient: bool = False  # what the layers are given needs a gradient, trained or not

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return ITEMSIZE[self.dtype]

    @property
    def acc(self) -> int:
        """Bytes of an element in the accumulation dtype."""
        return max(4, self.itemsize)

    @property
    def vocab(self) -> int:
        return 0 if self.head is None else self.head.vocab

    @property
    def norm_trained(self) -> Size:
        return NOTHING if self.norm is None else self.norm.trained

    @property
    def head_trained(self) -> Size:
        return NOTHING if self.head is None else self.head.trained

    @property
    def tied(self) -> bool:
        return self.head is not None and self.head.tied

    @property
    def first(self) -> int:
        """The first layer that keeps its input; the final norm counts as the last layer.

        Below it nothing is trained, so autograd records nothing.
        """
        if self.embedding.elements or self.input_gradient:
            return 0
        for index, layer in enumerate(self.layers):
            if layer.trained.elements:
                return index
        return len(self.layers) if self.norm_trained.elements else len(self.layers) + 1

    @property
    def attention(self) -> AttentionShape | None:
        """Of the first layer."""
        return self.layers[0].trace.attention if self.layers else None


# --- from models ----------------------------------------------------------------------------------


def describe(model: Any, *, head: bool = True) -> ModelShape:
    """Describe a causal language model that ``vs.stream`` understands.

    Args:
        model: the model or PEFT's wrapper of one, on any device; only shapes are read.
        head: whether the head is part of the job; a backbone called alone has none.

    Raises:
        UnsupportedModelError: the model has a part that streaming doesn't understand.
    """
    # Here, not above: streaming imports the planner.
    from varstream.streaming.structure import check_supported, find_parts

    streamed = hasattr(find_parts(model).model, "_varstream")  # and was checked then
    parts = find_parts(model) if streamed else check_supported(model)
    return describe_parts(parts.backbone, parts.head if head else None)


def describe_parts(backbone: Any, head: Any) -> ModelShape:
    """``describe`` for parts that have been checked; ``head`` is None where it is no part of the
    job.

    Raises:
        UntraceableError: a ValueError; what a layer does depends on values, not on shapes alone.
    """
    # Here, not above: the dispatch mode of a trace takes long to import.
    from varstream.planner.twins import Twin, parts_of

    layers, norm = parts_of(backbone)
    whole = [part for part in (backbone, head) if part is not None]
    params = list({id(p): p for part in whole for p in part.parameters()}.values())
    inner = {id(p) for module in [*layers, norm] if module is not None for p in module.parameters()}
    outer = [p for p in backbone.parameters() if id(p) not in inner]
    twin, config = Twin(backbone), backbone.config
    sizes = (_size([p]) for p in params if p.requires_grad)
    return ModelShape(
        model_type=config.model_type,
        dtype=str(twin.dtype).removeprefix("torch."),
        hidden=twin.width,
        max_length=config.max_position_embeddings,
        weights=_size(params),
        trained=_trained(params),
        largest=max(sizes, key=lambda size: size.bytes, default=NOTHING),
        embedding=_trained(outer),
        layers=tuple(
            LayerShape(_trained(layer.parameters()), twin.trace_layer(i), _products(layer, config))
            for i, layer in enumerate(layers)
        ),
        norm=None if norm is None else LayerShape(_trained(norm.parameters()), twin.trace_norm()),
        head=None if head is None else _head(head, backbone),
        row_bytes=twin.row_bytes,
        router_bytes=_router_bytes(twin),
        looks_up=twin.looks_up,
    )


def _router_bytes(twin: Any) -> int:
    if twin.routers is None:
        return 0
    kind, _ = twin.routers
    found: list[Any] = [m for layer in twin.layers for m in layer.modules() if isinstance(m, kind)]
    return sum(m.weight.shape[0] * m.weight.element_size() for m in found)


def _size(params: Iterable[Tensor]) -> Size:
    listed = list(params)
    return Size(sum(p.numel() for p in listed), sum(p.numel() * p.element_size() for p in listed))


def _trained(params: Iterable[Tensor]) -> Size:
    return _size(p for p in params if p.requires_grad)


def _head(head: Any, backbone: Any) -> HeadShape:
    weight = getattr(head, "base_layer", head).weight
    lowered = getattr(head, "lora_A", None)
    adapters: list[Any] = [] if lowered is None else [lowered]
    if isinstance(lowered, nn.ModuleDict):  # PEFT's, by the adapters' names
        adapters = [lowered[name] for name in head.active_adapters]
    return HeadShape(
        vocab=weight.shape[0],
        trained=_trained(head.parameters()),
        tied=weight is backbone.get_input_embeddings().weight,
        softcap=bool(getattr(backbone.config, "final_logit_softcapping", None)),
        rank=sum(adapter.weight.shape[0] for adapter in adapters),
    )


def _products(layer: nn.Module, config: Any) -> tuple[Product, ...]:
    """The layer's matrices; of stacked experts (E, m, k) one, and the rows it meets."""
    found = []
    for weight in layer.parameters():
        share = 1.0
        if weight.dim() == 3:
            share = min(1.0, getattr(config, "num_experts_per_tok", 1) / weight.shape[0])
        elif weight.dim() != 2 or 1 in weight.shape:
            continue
        k, m = weight.shape[-2:]
        found.append(Product(k, m, weight.element_size(), weight.requires_grad, share))
    return tuple(found)


# --- from configs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """What of a config's model is trained: ``"full"``, all; ``"lora"``, adapters of ``rank`` on the
    linear layers that ``targets`` names; ``"frozen"``, parameters whose names contain one of
    ``parts``."""

    name: str = "full"
    rank: int = 16
    targets: str | Sequence[str] = ALL_LINEAR
    adapter_dtype: torch.dtype = torch.float32
    parts: Sequence[str] = ("lm_head",)

    def apply(self, model: Any) -> None:
        from varstream.planner.modes import add_adapters, train_parts

        if self.name == "lora":
            head = model.get_output_embeddings()
            add_adapters(model, head, self.rank, self.targets, self.adapter_dtype)
        elif self.name == "frozen":
            train_parts(model, self.parts)


def describe_config(
    config: Any, dtype: torch.dtype | None = None, mode: Mode | None = None
) -> ModelShape:
    """Describe the model that a Hugging Face config makes.

    The model is built on the meta device: shapes only, no memory.

    Raises:
        ValueError: the config makes no model, or one that streaming doesn't understand, or the mode
            names what isn't there.
    """
    from transformers import AutoModelForCausalLM

    from varstream.streaming.structure import UnsupportedModelError, check_supported

    kind = getattr(config, "model_type", None)
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            "config.quantization_config is set; vs.stream trains plain weights only"
        )
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except Exception as error:  # whatever a constructor does with sizes that make no sense
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"the config makes no {kind} model: {text}") from error
    parts = check_supported(model)
    (mode or Mode()).apply(model)
    model.train()
    head = model.get_output_embeddings()  # an adapter may have taken its place
    return describe_parts(parts.backbone, head)
