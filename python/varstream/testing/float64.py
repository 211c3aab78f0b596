"""Float64 twins: copies of Hugging Face models without the float32 casts their classes contain.

A stock "float64" model casts norms, rotary tables, softmax, routers and loss to float32 and is
exact to about 6e-8 only; its twin computes everything in float64, so exactness can be tested to
rounding.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

IMPLEMENTATION = "varstream_float64"


def float64_twin(model: Any) -> Any:
    """Return a float64 copy of a Hugging Face causal language model.

    Norms, rotary tables, routers, attention and the loss compute in float64. The load balancing
    loss of a mixture of experts is a function of the model's module and stays as it is;
    ``load_balancing_loss`` is its float64 form.

    Raises:
        ValueError: a norm or rotary module isn't of a known form.
    """
    twin = copy.deepcopy(model).to(torch.float64)
    _register()
    twin.config._attn_implementation = IMPLEMENTATION
    twin.config._experts_implementation = "eager"  # the grouped product knows no float64
    for name, module in twin.named_modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm):
            if not hasattr(module, "variance_epsilon") and not hasattr(module, "_norm"):
                raise ValueError(f"{name}: a {kind} without variance_epsilon isn't understood")
            module.forward = MethodType(_rms_norm, module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = MethodType(_rotary, module)
        elif kind.endswith("TopKRouter"):
            module.forward = MethodType(_router, module)
        elif kind.endswith("LayerNorm") and not isinstance(module, nn.LayerNorm):
            raise ValueError(f"{name}: a {kind} isn't understood")
    twin.loss_function = causal_lm_loss
    return twin


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    if hasattr(self, "variance_epsilon"):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * scale
    return self._norm(x) * (1.0 + self.weight)  # Gemma's


@torch.no_grad()
def _rotary(
    self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[Tensor, Tensor]:
    prefix = "" if layer_type is None else f"{layer_type}_"
    angles = position_ids[..., None].double() * getattr(self, f"{prefix}inv_freq").double()
    angles = torch.cat((angles, angles), dim=-1)
    scaling = getattr(self, f"{prefix}attention_scaling")
    return angles.cos() * scaling, angles.sin() * scaling


def _router(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
    scores, experts = logits.softmax(-1).topk(self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):
        scores = scores / scores.sum(-1, keepdim=True)
    return logits, scores, experts


# --- attention ------------------------------------------------------------------------------------


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The classes' eager attention without its cast."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


# --- losses ---------------------------------------------------------------------------------------


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


def load_balancing_loss(
    gate_logits: tuple[Tensor, ...],
    num_experts: int,
    top_k: int = 2,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """transformers' load balancing loss without its casts: experts times the sum over them of the
    share of rows that chose each and of its mean probability, over all layers.

    Args:
        gate_logits: ``(rows, num_experts)`` of each layer.
        num_experts: how many there are.
        top_k: how many each row chooses.
        attention_mask: ``(B, S)``, rows = B S; rows at zeros don't count.

    Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6.
    """
    logits = torch.stack(gate_logits)
    real = torch.ones(logits.shape[1]) if attention_mask is None else attention_mask.flatten()
    weight = real.to(logits)[:, None] / (real.sum() * len(gate_logits))
    probabilities = logits.softmax(-1)
    chosen = nn.functional.one_hot(probabilities.topk(top_k, dim=-1).indices, num_experts).sum(2)
    shares, means = ((t * weight).sum((0, 1)) for t in (chosen, probabilities))
    return num_experts * (shares * means).sum()
