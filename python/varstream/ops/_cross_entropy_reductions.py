"""From the terms of the cross-entropy to its loss and metrics, whoever forms the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from varstream._checks import check_normalizer
from varstream.ops._cross_entropy_terms import Terms
from varstream.reference.cross_entropy import Scales
from varstream.reference.token_logprobs import RowValues, Wanted


class CrossEntropyMetrics(NamedTuple):
    """What ``linear_cross_entropy`` returns beside the loss; nothing here is differentiable."""

    z_loss: Tensor  # () acc dtype, the z term included in the loss (its sum for "none")
    accuracy: Tensor  # () acc dtype, share of valid targets that are the argmax of their row
    argmax: Tensor  # (N,) int64, -1 at ignored rows
    logp: Tensor  # like target, acc dtype, log p(target), 0 where ignored


class Sums(Protocol):
    """What a pass that sums the loss leaves, as in ``reference.cross_entropy.Loss``."""

    @property
    def loss_sum(self) -> Tensor: ...
    @property
    def lse_sq_sum(self) -> Tensor: ...
    @property
    def argmax(self) -> Tensor: ...
    @property
    def logp(self) -> Tensor: ...


class Driver(NamedTuple):
    """The two differentiable passes over the head's chunks, on one process or a group's ranks."""

    loss_sum: Callable[[Scales, bool], Sums]  # scales, whether metrics are wanted
    row_values: Callable[[Tensor | None, Wanted], RowValues]  # class weights (V,), what is wanted


Reduced = tuple[Tensor, CrossEntropyMetrics | None]


def reduce_loss(
    driver: Driver,
    target: Tensor,
    terms: Terms,
    reduction: str,
    normalizer: int | float | Tensor | None,
    return_metrics: bool,
) -> Reduced:
    """The loss by ``reduction``, and the metrics where they are wanted."""
    if reduction == "none":
        return _unreduced(driver, target, terms, return_metrics)
    divisor = _divisor(terms, normalizer) if reduction == "mean" else None
    return _reduced(driver, target, terms, divisor, return_metrics)


def _reduced(
    driver: Driver, target: Tensor, terms: Terms, divisor: Tensor | None, return_metrics: bool
) -> Reduced:
    """The sum, or the mean with its ``divisor`` (); the gradient is formed in the forward."""
    z_scale = z_factor = None
    if terms.z_loss != 0:
        # The whole sum is divided once, so the z term is scaled by divisor / rows beforehand.
        rows = terms.valid_rows.sum().clamp(min=1)
        z_factor = torch.full_like(terms.count, terms.z_loss, dtype=terms.acc)
        z_factor = z_factor if divisor is None else z_factor / rows
        z_scale = z_factor if divisor is None else z_factor * divisor
    smooth = terms.smooth
    if smooth is not None and smooth.dim() == 2:
        smooth = smooth.sum(1)  # of a row's targets: one sum over the classes serves them all
    scales = Scales(terms.smoothing_weight, terms.nll, smooth, z_scale)
    found = driver.loss_sum(scales, return_metrics)
    loss = found.loss_sum if divisor is None else found.loss_sum / divisor
    if not return_metrics:
        return loss, None
    z_term = torch.zeros_like(found.lse_sq_sum) if z_factor is None else found.lse_sq_sum * z_factor
    return loss, _metrics(target, terms, z_term, found.argmax, found.logp)


def _unreduced(driver: Driver, target: Tensor, terms: Terms, return_metrics: bool) -> Reduced:
    """Losses in the shape of target; the gradient is recomputed in the backward."""
    want = Wanted(class_sum=terms.smooth is not None, argmax=return_metrics)
    values = driver.row_values(terms.smoothing_weight, want)
    if terms.nll is None:
        loss = 0.0 - values.logp  # not neg: ignored rows are +0
    else:
        loss = torch.where(terms.nll == 0, 0.0, -values.logp * terms.nll)
    if terms.smooth is not None:
        class_sum = terms.like_target(values.class_sum)
        loss = loss + torch.where(terms.smooth == 0, 0.0, -class_sum * terms.smooth)
    z_term = values.lse.square() * terms.z_loss
    if terms.z_loss != 0:
        loss = loss + torch.where(terms.first_valid(), terms.like_target(z_term), 0.0)
    if not return_metrics:
        return loss, None
    return loss, _metrics(target, terms, z_term.detach().sum(), values.argmax, values.logp)


def _metrics(
    target: Tensor, terms: Terms, z_term: Tensor, argmax: Tensor, logp: Tensor
) -> CrossEntropyMetrics:
    hits = (target == terms.like_target(argmax)) & terms.valid
    accuracy = hits.sum().to(terms.acc) / terms.count.clamp(min=1)
    return CrossEntropyMetrics(z_term, accuracy, argmax, logp.detach())


def _divisor(terms: Terms, normalizer: int | float | Tensor | None) -> Tensor:
    """What the summed loss is divided by, () acc dtype; 1 where nothing is valid: 0 stays 0."""
    if normalizer is not None:
        return check_normalizer(normalizer, terms.count, terms.count.to(terms.acc))
    return torch.where(terms.count == 0, 1.0, terms.weight_sum())
