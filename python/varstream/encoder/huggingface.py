"""``vs.padding_free`` and ``vs.restore_padding``: a Hugging Face encoder, in place.

The forwards of the encoder, of its layers and of the head are replaced on the instances; weights,
configuration and ``state_dict`` stay what they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from varstream._checks import FLOATING, INTEGERS, check_tensor
from varstream.encoder.families import (
    Family,
    check_backbone,
    check_stack,
    check_stock,
    default_positions,
    embed,
    family_of,
    layers_of,
    parts_of,
)
from varstream.encoder.heads import Head, check_call, head_of
from varstream.encoder.layer import Rows
from varstream.ops.packing import Packed, pack, unpack

_STATE = "_varstream_padding_free"
_TAKEN = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"}
# num_items_in_batch comes from trainers; these encoders don't use it.
_IGNORED = {"return_dict", "num_items_in_batch"}


@dataclass(frozen=True)
class State:
    """How a module is padding-free; hangs on the encoder, its layers and the head while they
    are."""

    head: Head
    family: Family


def padding_free(model: Any) -> Any:
    """Make a Hugging Face encoder of the BERT family run on real tokens only, in place.

    A padded batch is packed before the embeddings, every layer runs on packed rows, forward and
    backward, and the last hidden states are unpacked once. Real positions hold what the padded
    model gives there; padded positions hold 0, and their gradients are 0. Use the model as before,
    for training and for inference; padding may stand anywhere (left, right, in holes, whole rows).
    Dropout draws its masks over packed rows: the same distribution, other draws than the padded
    model's. Gradient checkpointing is honoured. ``restore_padding`` undoes it.

    Refused at the call with a ValueError that names the reason: ``output_attentions``,
    ``output_hidden_states``, masks that aren't ``(B, S)``, caches, cross-attention and any other
    argument that has no meaning here; and where the padded model would read padding: a pooler or
    classification head on a row whose position 0 is padding, token labels other than -100 on
    padding, a label other than -100 for a sequence that is all padding, the span loss of question
    answering on a padded batch. (Without labels, pooler and logits of such a sequence hold what
    they make of zeros.)

    Args:
        model: a model of type ``bert``, ``roberta``, ``xlm-roberta``, ``electra`` or
            ``distilbert``: the encoder alone, or with its head for masked language modelling,
            pre-training, next sentence prediction, sequence or token classification, multiple
            choice or question answering.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: a ValueError naming the part of the model that isn't understood;
            nothing was changed.

    Source: ByteTransformer (arXiv 2210.03052), which removes padding for inference.
    """
    family = family_of(model)
    if any(_STATE in module.__dict__ for module in model.modules()):
        restore_padding(model)
    backbone = model.base_model
    check_stock("the model", model, family)
    head = head_of(model)
    check_backbone(backbone, family)
    pooled = getattr(backbone, "pooler", None) is not None
    state = State(replace(head, reads_first=head.reads_first or pooled), family)
    forwards: dict[nn.Module, Callable[..., Any]]
    forwards = {layer: _layer_forward for layer in layers_of(backbone, family)}
    if model is not backbone:
        forwards[model] = _head_forward
    forwards[backbone] = _backbone_forward
    for module, forward in forwards.items():
        module.__dict__[_STATE] = state
        module.forward = _bound(forward, module)
    return model


def restore_padding(model: Any) -> Any:
    """Undo ``padding_free``: give the model its own forwards back. Returns the same model.

    Raises:
        ValueError: the model is not padding-free, or a forward was replaced since.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    patched = [m for m in modules if _STATE in m.__dict__]
    if not patched:
        raise ValueError(f"{type(model).__name__} is not a padding-free model")
    ours = (_layer_forward, _head_forward, _backbone_forward)
    for module in patched:
        if getattr(module.forward, "func", None) not in ours:
            raise ValueError(
                f"{type(module).__name__}.forward was replaced after vs.padding_free; undo that "
                "first"
            )
    for module in patched:
        del module.__dict__[_STATE], module.forward
    return model


# --- the replaced forwards ------------------------------------------------------------------------


def _bound(forward: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """``forward`` as a method of ``module``, with the signature of its own: trainers read which
    columns a model takes. A partial of a module-level function survives deepcopy and pickle, and so
    does a signature without annotations."""
    method: Any = partial(forward, module)
    _, *parameters = _signature(type(module).forward).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    method.__signature__ = inspect.Signature(bare)
    return method


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, as the class's own forward would bind them."""
    bound = dict(_signature(type(module).forward).bind(module, *args, **kwargs).arguments)
    bound.pop("self")
    return bound | bound.pop("kwargs", {})


def _head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The head's own forward, after a look at what it would read from padding."""
    _check_head_call(self, args, kwargs)
    return type(self).forward(self, *args, **kwargs)


@torch._disable_dynamo  # it looks at values
def _check_head_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check_call(getattr(model, _STATE).head, _arguments(model, args, kwargs))


def _layer_forward(self: Any, *args: Any, rows: Rows | None = None, **kwargs: Any) -> Any:
    """A layer called by a padding-free encoder; any other call runs the layer's own forward."""
    if rows is None:
        return type(self).forward(self, *args, **kwargs)
    if self.gradient_checkpointing and self.training:
        return self._gradient_checkpointing_func(partial(_run_layer, self, rows), *args)
    return _run_layer(self, rows, *args)


def _run_layer(layer: Any, rows: Rows, x: Tensor) -> Tensor:
    name = type(layer).__name__
    return parts_of(name, layer, getattr(layer, _STATE).family).run(x, rows)


@torch._disable_dynamo  # the number of real tokens is a value in the data
def _backbone_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The encoder's forward: pack, embed, layers, unpack, pool."""
    given = _arguments(self, args, kwargs)
    _check_arguments(self, given)
    state: State = getattr(self, _STATE)
    family = state.family
    check_stack(self, family)
    packed, columns = _pack(self, given, state.head.reads_first)
    x = embed(self, **columns)
    rows = Rows(packed.cu_seqlens, packed.max_seqlen)
    for layer in layers_of(self, family):
        x = layer(x, rows=rows)
    hidden = unpack(packed, x)

    from transformers import modeling_outputs

    fields = {"last_hidden_state": hidden}
    if getattr(self, "pooler", None) is not None:
        fields["pooler_output"] = self.pooler(hidden)
    output = getattr(modeling_outputs, family.output)(**fields)
    return_dict = given.get("return_dict")
    if return_dict is None:
        return_dict = getattr(self.config, "return_dict", True)
    return output if return_dict else output.to_tuple()


def _check_arguments(backbone: Any, given: dict[str, Any]) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        value = given.pop(name, None)
        if value is None:
            value = getattr(backbone.config, name, False)
        if value is not False:
            raise ValueError(
                f"{name}={value} is not available on a padding-free model; call "
                "vs.restore_padding first"
            )
    own = _signature(type(backbone).forward).parameters
    for name, value in given.items():
        known = name in _IGNORED or (name in _TAKEN and name in own)
        if not known and value is not None and value is not False:
            raise ValueError(f"a padding-free model can't honour the argument {name}")


def _pack(
    backbone: Any, given: dict[str, Any], reads_first: bool
) -> tuple[Packed, dict[str, Tensor | None]]:
    """The packed batch and the packed columns that the embeddings take."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    if ids is not None:
        x = check_tensor("input_ids", ids, ndim=2, dtypes=INTEGERS, layout="(B, S)")
    else:
        x = check_tensor("inputs_embeds", embeds, ndim=3, dtypes=FLOATING, layout="(B, S, d)")
    shape = x.shape[:2]
    mask = given.get("attention_mask")
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=x.device)
    packed = pack(x, mask)
    if reads_first:
        _check_first(mask)

    positions = given.get("position_ids")
    if positions is None:
        positions = default_positions(backbone, ids, embeds)
    else:
        check_tensor("position_ids", positions, dtypes=INTEGERS, device=x.device)
        if tuple(positions.shape) not in (tuple(shape), (1, shape[1])):
            raise ValueError(
                f"position_ids must have shape {tuple(shape)} or (1, {shape[1]}), "
                f"got {tuple(positions.shape)}"
            )
    columns = {"position_ids": positions.expand(shape)}
    if (types := given.get("token_type_ids")) is not None:
        check_tensor("token_type_ids", types, shape=shape, dtypes=INTEGERS, layout="(B, S)")
        columns["token_type_ids"] = types
    picked: dict[str, Tensor | None] = {
        name: torch.ops.varstream.pack(column.reshape(-1), packed.indices)
        for name, column in columns.items()
    }
    picked["input_ids" if ids is not None else "inputs_embeds"] = packed.values
    return packed, picked


def _check_first(mask: Tensor) -> None:
    """Refuse rows with real tokens whose position 0, which a pooler or head reads, is padding."""
    real = mask != 0
    if mask.shape[1] == 0:
        return
    odd = real.any(1) & ~real[:, 0]
    if bool(odd.any()):
        raise ValueError(
            f"attention_mask must keep position 0, which the pooler or head reads, got padding "
            f"there in row {int(odd.nonzero()[0])}; pad on the right, or use an encoder without a "
            "pooler"
        )
