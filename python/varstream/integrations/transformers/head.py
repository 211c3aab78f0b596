"""``fuse_head``, ``unfuse_head``: a Hugging Face causal language model whose loss needs no logits.

One forward is replaced on the instance; weights, configuration, ``generate``, ``state_dict`` and
``save_pretrained`` stay what they are. Without labels the class's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import slice_logits_to_keep

from varstream._checks import check_float, check_int
from varstream.integrations.transformers.lazy_logits import (
    LazyCausalLMOutput,
    LazyLogits,
    Projection,
    projection_dtype,
)
from varstream.ops.linear_cross_entropy import linear_cross_entropy
from varstream.streaming import UnsupportedModelError
from varstream.streaming.calls import nan_of_nothing

_STATE = "_varstream_head"
_ITEMS = "num_items_in_batch"
_STREAMED = "_varstream"  # what vs.stream leaves on a model
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class HeadState:
    """How a model's head is fused; hangs on the model while it is."""

    chunk_size: int | None


@dataclass(frozen=True)
class Scaling:
    """What a family does to ``lm_head``'s output before the loss, read from the model."""

    logit_scale: Callable[[Any], float] = lambda model: 1.0
    softcap: Callable[[Any], float] = lambda model: 0.0


_PLAIN = Scaling()
_SOFTCAPPED = Scaling(softcap=lambda model: model.config.final_logit_softcapping or 0.0)
_SCALED = Scaling(logit_scale=lambda model: model.logit_scale)
_DIVIDED = Scaling(logit_scale=lambda model: 1.0 / model.config.logits_scaling)

# model_type -> the package under transformers.models and what happens to its logits.
FAMILIES: dict[str, tuple[str, Scaling]] = {
    **{
        name: (name, _PLAIN)
        for name in (
            "gemma",
            "llama",
            "ministral",
            "mistral",
            "olmo",
            "olmo2",
            "olmo3",
            "phi",
            "phi3",
            "qwen2",
            "qwen3",
            "smollm3",
            "starcoder2",
        )
    },
    "gemma2": ("gemma2", _SOFTCAPPED),
    "gemma3_text": ("gemma3", _SOFTCAPPED),
    "cohere": ("cohere", _SCALED),
    "cohere2": ("cohere2", _SCALED),
    "granite": ("granite", _DIVIDED),
}


def fuse_head(model: Any, chunk_size: int | None = None) -> Any:
    """Make a Hugging Face causal language model compute its loss without logits, in place.

    ``model(input_ids, labels=labels)`` then runs the backbone and ``vs.linear_cross_entropy``; the
    loss is transformers' own (label shift, ``num_items_in_batch``, ``shift_labels``,
    ``ignore_index``, ``logits_to_keep``), in float32 (float64 for float64 models), and
    ``output.logits`` is computed only if it is read. Trainers, ``generate``, checkpoints and PEFT
    adapters on other layers work as before. Where nothing is trained the loss is 0, not NaN
    (NaN without gradients: an evaluation leaves such a batch out).

    Under ``torch.compile`` the backbone is compiled and the head runs outside the graph.

    Args:
        model: a causal language model of transformers, of a family in ``FAMILIES``; with PEFT pass
            ``model.get_base_model()``.
        chunk_size: rows of a chunk of logits, ``None`` for the default of
            ``vs.linear_cross_entropy``.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: a ValueError naming the part of the model that isn't understood, such
            as an ``lm_head`` with an adapter or hooks, or a loss of the user's own; nothing was
            changed. What changes after this call is refused by the next forward with labels.
        TypeError, ValueError: ``chunk_size`` breaks its contract.
    """
    rows = None if chunk_size is None else check_int("chunk_size", chunk_size, low=1)
    if _is_fused(model):
        unfuse_head(model)
    _check_model(model)
    setattr(model, _STATE, HeadState(rows))
    # A partial of a module-level function: survives deepcopy and pickle.
    model.forward = partial(_forward, model)
    return model


def unfuse_head(model: Any) -> Any:
    """Undo ``fuse_head``. Returns the same model.

    Raises:
        ValueError: the model's head is not fused, or its forward was replaced afterwards.
    """
    if not _is_fused(model):
        raise ValueError(f"{type(model).__name__} has no fused head")
    if getattr(model.forward, "func", None) is not _forward:
        raise ValueError(
            f"{type(model).__name__}.forward was replaced after fuse_head; undo that first"
        )
    del model.__dict__[_STATE], model.forward
    return model


def _is_fused(model: Any) -> bool:
    """On the model itself: a wrapper, such as PEFT's, answers for the attributes of its inside."""
    return _STATE in getattr(model, "__dict__", {})


# --- checks ---------------------------------------------------------------------------------------


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if hasattr(model, _STREAMED):
        raise UnsupportedModelError(
            f"{name} is streamed and computes its loss without logits already; "
            "call vs.unstream first to fuse the head alone"
        )
    if hasattr(model, "get_base_model"):
        raise UnsupportedModelError(f"{name} wraps a model; pass model.get_base_model()")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"{name} has model type {kind!r}; fuse_head understands {', '.join(sorted(FAMILIES))}"
        )
    package = FAMILIES[kind][0]
    home = f"transformers.models.{package}.modeling_{package}"
    if type(model).__module__ != home or not name.endswith("ForCausalLM"):
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__qualname__} is not the ForCausalLM class of "
            f"{home}"
        )
    if "forward" in model.__dict__:
        raise UnsupportedModelError(
            f"{name} has a forward set on the instance; call fuse_head first and wrap afterwards"
        )
    _check_head(model)


def _check_head(model: Any) -> None:
    """What may have changed since ``fuse_head``: the projection and the loss we stand in for."""
    head = model.lm_head
    if type(head) is not nn.Linear:
        raise UnsupportedModelError(
            f"lm_head is a {type(head).__name__}, not a plain nn.Linear; "
            "a fused head reads its weight and would miss what the module adds"
        )
    if "forward" in head.__dict__ or any(getattr(head, hooks) for hooks in _HOOKS):
        raise UnsupportedModelError(
            "lm_head has hooks or a forward of its own, which would not run in a fused head"
        )
    function = model.loss_function
    if function is not ForCausalLMLoss and not getattr(function, "is_causal_lm_loss", False):
        name = getattr(function, "__name__", repr(function))
        raise UnsupportedModelError(
            f"model.loss_function is {name}; a fused head computes ForCausalLMLoss only. "
            "Call unfuse_head, or the model without labels."
        )


# --- the replaced forward -------------------------------------------------------------------------


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    **kwargs: Any,
) -> Any:
    """The model's forward; with labels the loss comes from the hidden states."""
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    if labels is None:
        return type(self).forward(self, **inputs, logits_to_keep=logits_to_keep, **kwargs)
    _check_head(self)
    return_dict = kwargs.pop("return_dict", None)
    if return_dict is None:
        return_dict = getattr(self.config, "return_dict", True)
    outputs = self.model(**inputs, **kwargs, return_dict=True)
    hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
    output = _loss_and_lazy_logits(self, hidden, labels, kwargs)
    for name in ("past_key_values", "hidden_states", "attentions"):
        setattr(output, name, getattr(outputs, name))
    return output if return_dict else output.to_tuple()


@torch.compiler.disable(reason="the chunk loop and the lazy logits stay outside compiled graphs")
def _loss_and_lazy_logits(
    model: Any, hidden: Tensor, labels: Tensor, kwargs: dict[str, Any]
) -> LazyCausalLMOutput:
    """hidden (B, S, d) or, with a boolean ``logits_to_keep``, (n, d)."""
    state: HeadState = getattr(model, _STATE)
    scaling = FAMILIES[model.config.model_type][1]
    head, scale, softcap = model.lm_head, scaling.logit_scale(model), scaling.softcap(model)
    ignore_index = kwargs.get("ignore_index", -100)
    targets = _targets(labels, kwargs.get("shift_labels"), ignore_index, hidden)
    items = _items(kwargs.get(_ITEMS))
    loss = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        head.weight,
        targets,
        linear_bias=head.bias,
        ignore_index=ignore_index,
        logit_scale=scale,
        softcap=softcap,
        normalizer=items,
        chunk_size=state.chunk_size,
    )
    loss = nan_of_nothing(loss, targets, items, ignore_index)
    projection = Projection(
        hidden,
        head.weight,
        head.bias,
        scale,
        softcap,
        projection_dtype(hidden),
        torch.is_grad_enabled(),
    )
    return LazyCausalLMOutput(loss=loss, logits=LazyLogits.make(projection))


def _items(count: Any) -> Any:
    """``num_items_in_batch``, checked under its own name as far as its value is known here."""
    if count is not None and not isinstance(count, Tensor) and not check_float(_ITEMS, count) > 0:
        raise ValueError(f"{_ITEMS} must be above 0, got {count}")
    return count


def _targets(
    labels: Tensor, shift_labels: Tensor | None, ignore_index: int, hidden: Tensor
) -> Tensor:
    """One class per row of hidden, shifted as transformers does: (B, S) to (B * S,)."""
    name = "labels" if shift_labels is None else "shift_labels"
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    rows = hidden.numel() // hidden.shape[-1]
    if shift_labels.numel() != rows:
        raise ValueError(
            f"{name} must have one entry for each of the {rows} positions whose logits are kept, "
            f"got shape {tuple(shift_labels.shape)}"
        )
    return shift_labels.reshape(-1).to(hidden.device)
