"""The terms of the cross-entropy per target: who takes part and what multiplies each loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varstream._checks import acc_dtype
from varstream.ops._head import HeadCall


@dataclass(frozen=True)
class Terms:
    """Factors in acc dtype, of the shape of target unless said and 0 at ignored targets."""

    valid: Tensor  # bool
    count: Tensor  # () int64, valid targets
    class_weight: Tensor | None  # w_y; None: all 1
    nll: Tensor | None  # of -log p(target); None: all 1
    smooth: Tensor | None  # of sum_c w_c (-log p_c); None: no smoothing
    smoothing_weight: Tensor | None  # (V,) w of that sum; None: all 1
    z_loss: float
    acc: torch.dtype

    @property
    def valid_rows(self) -> Tensor:
        """Rows (N,) with a valid target."""
        return self.valid if self.valid.dim() == 1 else self.valid.any(1)

    def first_valid(self) -> Tensor:
        """Where a row's first valid target stands, the shape of target."""
        if self.valid.dim() == 1:
            return self.valid
        return self.valid & (self.valid.cumsum(1) == 1)

    def like_target(self, per_row: Tensor) -> Tensor:
        """Values (N,) so that they broadcast with target."""
        return per_row if self.valid.dim() == 1 else per_row[:, None]

    def weight_sum(self) -> Tensor:
        """Sum of the class weights of the valid targets, torch's divisor, ()."""
        return self.count.to(self.acc) if self.class_weight is None else self.class_weight.sum()


def terms_of(
    call: HeadCall,
    weight: Tensor | None,
    token_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
) -> Terms:
    """The terms of checked arguments: ``weight`` (V,), ``token_weight`` like target."""
    target, acc = call.target, acc_dtype(call.input.dtype)
    valid = target != call.ignore_index
    classes = call.linear_weight.shape[0]
    factor = valid.to(acc) if token_weight is None else torch.where(valid, token_weight.to(acc), 0)
    class_weight = nll = smooth = None
    if weight is not None:
        # Clamped: the op refuses targets outside [0, V), ignored ones may be.
        index = target.long().clamp(0, classes - 1)
        class_weight = torch.where(valid, weight.to(acc)[index], 0)
    if weight is not None or token_weight is not None or label_smoothing > 0:
        nll = factor * (1 - label_smoothing)
        nll = nll if class_weight is None else nll * class_weight
    if label_smoothing > 0:
        smooth = factor * (label_smoothing / classes)
    smoothing_weight = weight if label_smoothing > 0 else None
    return Terms(valid, valid.sum(), class_weight, nll, smooth, smoothing_weight, z_loss, acc)
