"""Float64 twins: copies of Hugging Face models without the float32 casts their classes contain.

A stock "float64" model casts norms, rotary tables, softmax and loss to float32 and is exact to
about 6e-8 only; its twin computes everything in float64, so exactness can be tested to rounding.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def float64_twin(model: Any) -> Any:
    """Return a float64 copy of a Hugging Face causal language model (Llama, Qwen2, Qwen3).

    Norms and rotary tables compute in float64, attention goes through SDPA (which keeps float64),
    and so does the loss.

    Raises:
        ValueError: a norm or rotary module isn't of the known form.
    """
    twin = copy.deepcopy(model).to(torch.float64)
    twin.config._attn_implementation = "sdpa"
    for name, module in twin.named_modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            if not hasattr(module, "variance_epsilon"):
                raise ValueError(f"{name}: a {kind} without variance_epsilon isn't understood")
            module.forward = MethodType(_rms_norm, module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = MethodType(_rotary, module)
        elif kind.endswith("LayerNorm") and not isinstance(module, nn.LayerNorm):
            raise ValueError(f"{name}: a {kind} isn't understood")
    twin.loss_function = causal_lm_loss
    return twin


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@torch.no_grad()
def _rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].double() * self.inv_freq.double()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' causal language model loss without its cast to float32."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = nn.functional.cross_entropy(
        logits.view(-1, vocab_size),
        shift_labels.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch


causal_lm_loss.is_causal_lm_loss = True  # type: ignore[attr-defined]  # vs.stream may fuse it
