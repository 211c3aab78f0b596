"""Which calls without gradients stream: those that make no cache and ask for nothing that streaming
doesn't give. The others run the model's own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream.streaming.rows import documents_shown

REFUSED_OUTPUTS = ("output_attentions", "output_hidden_states")


def asks_for_cache(given: dict[str, Any]) -> bool:
    """Whether a call asks for a cache or brings one; transformers' default asks for none."""
    return bool(given.get("use_cache")) or given.get("past_key_values") is not None


def streamable(config: Any, given: dict[str, Any]) -> bool:
    """Whether nothing in a call is refused where it streams."""
    mask = given.get("attention_mask")
    return (
        (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
        and given.get("is_causal") is not False
        and not any(wanted(config, given, name) for name in REFUSED_OUTPUTS)
    )


def wanted(config: Any, given: dict[str, Any], name: str) -> bool:
    """A flag of a call, which its configuration gives where the call doesn't."""
    value = given.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def without_cache(config: Any, given: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """For a call of a backbone that asks for no cache: whether it makes none, and its arguments, in
    which the model's own forward sees packed documents.

    A cache is made where nothing is said, unless there are documents: with one they would see each
    other.
    """
    mask, positions, packed = documents_shown(
        given.get("attention_mask"), given.get("position_ids"), given.get("cu_seq_lens_q")
    )
    none = packed or not wanted(config, given, "use_cache")
    shown = {"attention_mask": mask, "position_ids": positions}
    return none, given | shown | ({"use_cache": False} if none else {})


def nan_of_nothing(loss: Tensor, targets: Tensor, items: Any, ignore_index: int) -> Tensor:
    """transformers' loss where nothing is counted, NaN, which an evaluation's mean over batches
    leaves out; while training ours is 0.

    Args:
        loss: () float.
        targets: (...) integers.
        items: what the loss was divided by, a number or a tensor (); None for the targets' number.
        ignore_index: the target that isn't counted.
    """
    if torch.is_grad_enabled():
        return loss
    if items is None:
        items = (targets != ignore_index).sum()
    nothing = torch.as_tensor(items, device=loss.device) == 0
    return loss.masked_fill(nothing, float("nan"))
