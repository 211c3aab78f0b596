"""What a call of a streamed model asks for: what streaming refuses, and which calls without
gradients stream rather than run the model's own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream.streaming.routers import router_class
from varstream.streaming.rows import documents_shown

# The arguments of a backbone that streaming reads, or may ignore.
_READ = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "is_causal", "seq_idx")
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_OPTIONS = ("use_cache", "past_key_values", "return_dict", "output_router_logits")
_LOSS = ("num_items_in_batch", "shift_labels")
_REFUSED = ("output_attentions", "output_hidden_states")
_KNOWN = {*_READ, *_LENGTHS, *_OPTIONS, *_LOSS, *_REFUSED}


def refusal(config: Any, given: dict[str, Any]) -> str | None:
    """Why a backbone's call can't stream, told by its arguments; None where it can."""
    for name in _REFUSED:
        if wanted(config, given, name):
            return f"{name}=True is not available on a streamed model; call vs.unstream first"
    if given.get("is_causal") is False:
        return "is_causal=False is not available on a streamed model"
    unknown = sorted(n for n, value in given.items() if n not in _KNOWN and value is not None)
    return f"a streamed model can't honour the argument {unknown[0]}" if unknown else None


def wanted(config: Any, given: dict[str, Any], name: str) -> bool:
    """A flag of a call, which its configuration gives where the call doesn't."""
    value = given.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def asks_for_cache(given: dict[str, Any]) -> bool:
    """Whether a call asks for a cache or brings one; transformers' default asks for none."""
    return bool(given.get("use_cache")) or given.get("past_key_values") is not None


# --- calls without gradients ----------------------------------------------------------------------


def streamable(backbone: Any, given: dict[str, Any]) -> bool:
    """Whether a backbone's call can stream, told by its arguments. What their values say (a mask
    with holes under a window) is refused later, as while training."""
    mask = given.get("attention_mask")
    routers = wanted(backbone.config, given, "output_router_logits")
    return (
        refusal(backbone.config, given) is None
        and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
        and (not routers or router_class(backbone) is not None)
    )


def without_cache(config: Any, given: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """For a call of a backbone that asks for no cache: whether it makes none, and its arguments, in
    which the model's own forward sees packed documents.

    A cache is made where nothing is said, unless there are documents: with one they would see each
    other.
    """
    lengths = given.get("cu_seq_lens_q")
    mask, positions, several = documents_shown(
        given.get("attention_mask"), given.get("position_ids"), lengths
    )
    none = several or lengths is not None or not wanted(config, given, "use_cache")
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
