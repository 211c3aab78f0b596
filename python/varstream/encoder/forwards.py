"""The forwards that ``vs.padding_free`` puts in the place of a model's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from varstream._checks import check_bool
from varstream.encoder.batch import Batch, pack_batch
from varstream.encoder.family import Family
from varstream.encoder.heads import Form, Head, check_call
from varstream.encoder.layer import Rows
from varstream.encoder.pooling import mean_pool
from varstream.ops.packing import Packed, unpack

STATE = "_varstream_padding_free"
_TAKEN = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"}
# num_items_in_batch comes from trainers; these encoders don't use it.
_IGNORED = {"return_dict", "num_items_in_batch"}


@dataclass(frozen=True)
class State:
    """How a module is padding-free; hangs on the encoder, its layers and the head while they
    are."""

    head: Head
    family: Family
    output_packed: bool = False


@dataclass
class Asked:
    """What a caller that we replaced wants from the encoder inside it, and what it got."""

    form: Form
    batch: Batch | None = None


ASKED: ContextVar[Asked | None] = ContextVar("varstream_asked", default=None)


# --- binding --------------------------------------------------------------------------------------


def bound(forward: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
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


# --- layers ---------------------------------------------------------------------------------------


def layer_forward(self: Any, *args: Any, rows: Rows | None = None, **kwargs: Any) -> Any:
    """A layer called by a padding-free encoder; any other call runs the layer's own forward."""
    if rows is None:
        return type(self).forward(self, *args, **kwargs)
    if self.training and getattr(self, "gradient_checkpointing", False):
        # Shared tensors with gradients are arguments, for a checkpoint that is reentrant.
        run = partial(_run_layer, self, rows)
        return self._gradient_checkpointing_func(run, *args, *rows.shared)
    return _run_layer(self, rows, *args, *rows.shared)


def _run_layer(layer: Any, rows: Rows, x: Tensor, *shared: Tensor) -> Tensor:
    family: Family = getattr(layer, STATE).family
    return family.read(type(layer).__name__, layer).run(x, replace(rows, shared=shared))


# --- the encoder ----------------------------------------------------------------------------------


@torch._disable_dynamo  # the number of real tokens is a value in the data
def backbone_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The encoder's forward: pack, embed, layers, unpack, pool."""
    state: State = getattr(self, STATE)
    output_packed = _pop_output_packed(kwargs, state)
    given = _arguments(self, args, kwargs)
    _check_arguments(self, given)
    family, asked = state.family, ASKED.get()
    family.check_bypassed(self)
    if asked is not None and asked.batch is not None:
        batch = asked.batch
    else:
        batch = pack_batch(self, family, given, _reads_first(self, state, asked))
    if asked is not None:
        form, asked.batch = asked.form, batch
    else:
        form = Form.PACKED if output_packed else Form.PADDED
    x = _run(self, family, batch)
    packed, first = batch.packed._replace(values=batch.pick_real(x)), batch.pick_first(x)

    from transformers import modeling_outputs

    states = _in_form(packed, first, form)
    if form is Form.PADDED and asked is not None and state.head.form is Form.FIRST:
        assert isinstance(states, Tensor)
        states = torch.cat([first[:, None], states[:, 1:]], dim=1)  # the head reads it there
    fields: dict[str, Any] = {"last_hidden_state": states}
    if family.has_pooler(self) and form is not Form.TOKENS:
        fields["pooler_output"] = family.pool(self, first)
    output = getattr(modeling_outputs, family.output)(**fields)
    return_dict = given.get("return_dict")
    if return_dict is None:
        return_dict = getattr(self.config, "return_dict", True)
    return output if return_dict else output.to_tuple()


def _run(backbone: Any, family: Family, batch: Batch) -> Tensor:
    """Embeddings and layers on the batch's rows: (rows, d)."""
    x = family.embed(backbone, batch.columns)
    shared = family.share(backbone, x, batch.columns["position_ids"], batch.rows)
    rows = replace(batch.rows, shared=shared)
    for layer in family.order(backbone):
        x = layer(x, rows=rows)
    return family.finish(backbone, x)


def _in_form(packed: Packed, first: Tensor, form: Form) -> Tensor | Packed:
    if form is Form.PADDED:
        return unpack(packed)
    if form is Form.PACKED:
        return packed
    if form in (Form.ROWS, Form.TOKENS):
        return packed.values[None]
    return (first if form is Form.FIRST else mean_pool(packed))[:, None]


def _reads_first(backbone: Any, state: State, asked: Asked | None) -> bool:
    if asked is not None and asked.form is Form.TOKENS:
        return False
    return state.head.reads_first or state.family.has_pooler(backbone)


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


# --- heads ----------------------------------------------------------------------------------------


def head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The head's own forward, on no more of the encoder's output than it reads."""
    call = _prepare(self, args, kwargs)
    try:
        output = type(self).forward(self, **call.arguments)
    finally:
        _finish()
    return output if call.finish is None else call.finish(output)


@dataclass(frozen=True)
class _HeadCall:
    """Arguments of the head's own forward, and what becomes of its output."""

    arguments: dict[str, Any]
    finish: Callable[[Any], Any] | None = None


@torch._disable_dynamo  # it looks at values
def _prepare(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _HeadCall:
    """Check a head's call, and ask the encoder for the form of output that the head needs."""
    state: State = getattr(model, STATE)
    backbone = model.base_model
    output_packed = _pop_output_packed(kwargs, state)
    if output_packed:
        state.head.check_output_packed(model)
    given = _arguments(model, args, kwargs)
    check_call(state.head, given)
    form = state.head.form
    odd = form is Form.ROWS and _has_odd_labels(given)
    if not output_packed and (odd or _is_watched(backbone)):
        form = Form.PADDED
    asked, finish = Asked(form), None
    if form in (Form.ROWS, Form.MEAN):
        reads_first = _reads_first(backbone, state, asked)
        asked.batch = pack_batch(backbone, state.family, given, reads_first)
        if form is Form.ROWS:
            return_dict = given.get("return_dict")
            if return_dict is None:
                return_dict = getattr(model.config, "return_dict", True)
            finish = partial(
                _spread, asked.batch.packed, state.head.positions, output_packed, return_dict
            )
        given = _head_arguments(given, asked.batch.packed, form)
    ASKED.set(asked)
    return _HeadCall(given, finish)


@torch._disable_dynamo
def _finish() -> None:
    ASKED.set(None)


def _is_watched(backbone: nn.Module) -> bool:
    """Whether hooks look at the encoder's output, which they know padded."""
    return bool(backbone._forward_hooks or backbone._forward_pre_hooks)


def _has_odd_labels(given: dict[str, Any]) -> bool:
    """Whether labels, which a head flattens, are not (B, S) as the batch that is to be packed."""
    labels, x = given.get("labels"), given.get("input_ids")
    x = given.get("inputs_embeds") if x is None else x
    if not isinstance(labels, Tensor) or not isinstance(x, Tensor):
        return False
    return labels.shape != x.shape[:2]


def _head_arguments(given: dict[str, Any], packed: Packed, form: Form) -> dict[str, Any]:
    """Arguments as of a batch without padding: one sequence of all tokens, or of one row each."""
    rows, columns = packed.batch, 1
    arguments = {name: value for name, value in given.items() if name not in _TAKEN}
    if form is Form.ROWS:
        rows, columns = 1, packed.indices.shape[0]
        arguments["return_dict"] = True
        if isinstance(labels := given.get("labels"), Tensor):
            shape = (packed.batch, packed.seqlen)
            if tuple(labels.shape) != shape:
                raise ValueError(f"labels must have shape {shape}, got {tuple(labels.shape)}")
            picked = torch.ops.varstream.pack(labels.reshape(-1), packed.indices)
            arguments["labels"] = picked[None]
    # The encoder has its batch; these say how many sequences of how many tokens there are.
    arguments["input_ids"] = packed.indices.new_zeros((rows, columns))
    arguments["attention_mask"] = packed.indices.new_ones((rows, columns))
    return arguments


def _spread(packed: Packed, field: str, output_packed: bool, return_dict: bool, output: Any) -> Any:
    """The output of a head that ran on one sequence of all tokens, as of the padded batch."""
    rows = packed._replace(values=output[field][0])
    if tuple(output[field].shape[:2]) == (1, packed.indices.shape[0]):  # else it chose positions
        output[field] = rows if output_packed else unpack(rows)
    return output if return_dict else output.to_tuple()


def _pop_output_packed(kwargs: dict[str, Any], state: State) -> bool:
    value = kwargs.pop("output_packed", None)
    if value is not None:
        check_bool("output_packed", value)
    return state.output_packed if value is None else value
