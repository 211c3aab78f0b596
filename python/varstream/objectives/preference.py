"""Preference objectives over pairs: packed sequences alternate chosen, rejected.

The shared rules: sums and means over a sequence take its trained tokens only; a sum or mean over no
token is 0, so a sequence without trained tokens brings no gradient; B = 0 gives 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from varstream._checks import check_bool, check_float, check_positive
from varstream.objectives._segments import (
    Normalizer,
    Sequences,
    average,
    check_mask,
    sequences,
    widened,
)


def dpo(
    logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    ref_logp: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    average_log_prob: bool = False,
    normalizer: Normalizer = None,
) -> Tensor:
    """Direct preference optimisation, the mean over pairs of
    ``-(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d)``.

    ``d = r_chosen - r_rejected``, ``r = sum_t (logp_t - ref_logp_t)`` over trained tokens,
    ``eps = label_smoothing``.

    Args:
        logp: ``(N,)`` log-probabilities of the packed tokens, as ``vs.token_logprobs`` gives them;
            float64, float32, bfloat16 or float16.
        mask: ``(N,)`` bool, true at trained tokens; other rows are never used and get zero
            gradients, even if they hold NaN.
        cu_seqlens: ``(B+1,)`` int32; sequences alternate chosen, rejected, so B is even.
        ref_logp: ``(N,)`` under the reference model, floating; no gradient.
        beta: strength of the pull to the reference, above 0.
        label_smoothing: probability that a pair's order is wrong (conservative DPO), 0 to 0.5.
        average_log_prob: take means over trained tokens instead of sums.
        normalizer: divisor in place of the number of pairs, such as those of all micro-batches and
            ranks: a number or a tensor of one element.

    Returns:
        Scalar in float32 (float64 for float64 ``logp``).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a wrong shape, dtype, device or value, or B odd; values of tensors are checked
            on the CPU.

    Source: DPO, arXiv 2305.18290. TRL: ``DPOTrainer`` with ``loss_type="sigmoid"``, or
    ``"sigmoid_norm"`` with ``average_log_prob``.
    """
    seq = _pairs(logp, mask, cu_seqlens)
    beta = check_positive("beta", beta)
    margin = _margin(seq, seq.logp - seq.constant("ref_logp", ref_logp), average_log_prob)
    return average(_logistic(beta * margin, label_smoothing).sum(), seq.batch // 2, normalizer)


def ipo(
    logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    ref_logp: Tensor,
    beta: float = 0.1,
    average_log_prob: bool = True,
    normalizer: Normalizer = None,
) -> Tensor:
    """Identity preference optimisation, the mean over pairs of ``(d - 1 / (2 beta))^2``.

    ``d`` is the margin of ``dpo``, by default between means over trained tokens, which keeps the
    loss independent of length; ``average_log_prob=False`` takes sums, the letter of the paper's
    equation 17 (its tau is ``beta``). Other arguments, result and errors as in ``dpo``.

    Source: IPO, arXiv 2310.12036. TRL: ``DPOTrainer`` with ``loss_type="ipo"`` (means).
    """
    seq = _pairs(logp, mask, cu_seqlens)
    target = 0.5 / check_positive("beta", beta)
    margin = _margin(seq, seq.logp - seq.constant("ref_logp", ref_logp), average_log_prob)
    return average((margin - target).square().sum(), seq.batch // 2, normalizer)


def simpo(
    logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
    normalizer: Normalizer = None,
    nll_normalizer: Normalizer = None,
) -> Tensor:
    """SimPO, the mean over pairs of ``-log sigmoid(beta d - gamma)``, without a reference model.

    ``d`` is the difference of the mean log-probabilities of chosen and rejected.
    ``label_smoothing`` as in ``dpo``; ``alpha`` adds the chosen sequences' likelihood as in ``cpo``
    (CPO-SimPO).

    Args:
        logp, mask, cu_seqlens, label_smoothing, normalizer: as in ``dpo``.
        beta: factor of the margin, above 0.
        gamma: target margin of the reward ``beta d``, any sign.
        alpha, nll_normalizer: as in ``cpo``.

    Returns, errors: as in ``dpo``.

    Source: SimPO, arXiv 2405.14734. TRL: experimental ``CPOTrainer`` with ``loss_type="simpo"``,
    ``simpo_gamma`` and ``cpo_alpha=alpha``.
    """
    seq = _pairs(logp, mask, cu_seqlens)
    beta, gamma = check_positive("beta", beta), check_float("gamma", gamma)
    margin = beta * _margin(seq, seq.logp, True) - gamma
    loss = average(_logistic(margin, label_smoothing).sum(), seq.batch // 2, normalizer)
    return loss + check_float("alpha", alpha, low=0.0) * _chosen_nll(seq, nll_normalizer)


def cpo(
    logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    normalizer: Normalizer = None,
    nll_normalizer: Normalizer = None,
) -> Tensor:
    """Contrastive preference optimisation: the mean over pairs of ``-log sigmoid(beta d)`` plus
    ``alpha`` times the chosen sequences' negative log-likelihood per trained token.

    ``d`` is the difference of the summed log-probabilities of chosen and rejected.

    Args:
        logp, mask, cu_seqlens, label_smoothing, normalizer: as in ``dpo``.
        beta: factor of the margin, above 0.
        alpha: weight of the likelihood term, not negative.
        nll_normalizer: divisor of the likelihood term in place of the number of trained tokens in
            chosen sequences: a number or a tensor of one element.

    Returns, errors: as in ``dpo``.

    Source: CPO, arXiv 2401.08417. TRL: experimental ``CPOTrainer`` with ``loss_type="sigmoid"``
    and ``cpo_alpha=alpha``.
    """
    seq = _pairs(logp, mask, cu_seqlens)
    margin = check_positive("beta", beta) * _margin(seq, seq.logp, False)
    loss = average(_logistic(margin, label_smoothing).sum(), seq.batch // 2, normalizer)
    return loss + check_float("alpha", alpha, low=0.0) * _chosen_nll(seq, nll_normalizer)


def orpo(
    logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float = 0.1,
    nll_mask: Tensor | None = None,
    normalizer: Normalizer = None,
    nll_normalizer: Normalizer = None,
) -> Tensor:
    """Odds-ratio preference optimisation: the chosen sequences' negative log-likelihood per token
    minus ``beta`` times the mean over pairs of ``log sigmoid(log odds_c - log odds_r)``.

    ``log odds = m - log(1 - e^m)`` with ``m`` the mean log-probability of the trained tokens, taken
    as at most ``-eps`` of the dtype, where the odds would be infinite. A pair with a member
    without trained tokens has no odds ratio and adds 0.

    Args:
        logp, mask, cu_seqlens, normalizer: as in ``dpo``.
        beta: weight of the odds ratio, above 0.
        nll_mask: ``(N,)`` bool, the tokens of the likelihood term where they aren't ``mask``, such
            as prompt and completion; rejected sequences are left out of it either way.
        nll_normalizer: divisor of the likelihood term in place of its number of tokens: a number or
            a tensor of one element.

    Returns, errors: as in ``dpo``.

    Source: ORPO, arXiv 2403.07691. TRL: experimental ``ORPOTrainer``, whose likelihood covers
    prompt and completion (``nll_mask``).
    """
    logp = widened(logp)  # once: the gradients of both terms meet in acc dtype
    seq = _pairs(logp, mask, cu_seqlens)
    beta = check_positive("beta", beta)
    chosen_length, rejected_length = _split(seq.lengths)
    present = (chosen_length > 0) & (rejected_length > 0)
    mean = seq.mean(seq.logp).clamp(max=-torch.finfo(seq.logp.dtype).eps)
    chosen, rejected = _split(mean - log1mexp(mean))
    terms = torch.where(present, logsigmoid(chosen - rejected), 0.0)
    ratio = average(terms.sum(), seq.batch // 2, normalizer)
    likelihood = seq
    if nll_mask is not None:
        likelihood = sequences(logp, check_mask("nll_mask", nll_mask, logp), cu_seqlens)
    return _chosen_nll(likelihood, nll_normalizer) - beta * ratio


# --- parts ----------------------------------------------------------------------------------------


def _pairs(logp: Any, mask: Any, cu_seqlens: Any) -> Sequences:
    """Checked packed rows whose sequences come in pairs."""
    seq = sequences(logp, mask, cu_seqlens)
    if seq.batch % 2:
        raise ValueError(
            "cu_seqlens must hold an even number of sequences, chosen and rejected alternating, "
            f"got {seq.batch}"
        )
    return seq


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) -> chosen (B/2,), rejected (B/2,)."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


def _margin(seq: Sequences, values: Tensor, means: bool) -> Tensor:
    """Chosen minus rejected (B/2,) of the sums or means of ``values`` (N,)."""
    means = check_bool("average_log_prob", means)
    chosen, rejected = _split(seq.mean(values) if means else seq.sum(values))
    return chosen - rejected


def _logistic(margin: Tensor, label_smoothing: Any) -> Tensor:
    """Logistic loss of scaled margins (B/2,)."""
    smoothing = check_float("label_smoothing", label_smoothing, low=0.0, high=0.5)
    loss = -logsigmoid(margin)
    return loss if smoothing == 0 else (1 - smoothing) * loss - smoothing * logsigmoid(-margin)


def _chosen_nll(seq: Sequences, normalizer: Normalizer) -> Tensor:
    """Negative log-likelihood of the chosen sequences, by default per token."""
    count = _split(seq.lengths)[0].sum()
    total = -_split(seq.sum(seq.logp))[0].sum()
    return average(total, count, normalizer, "nll_normalizer")


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - e^x)`` for ``x < 0``, accurate at both ends, in value and gradient.

    Source: M. Maechler, "Accurately computing log(1 - exp(-|a|))", 2012.
    """
    near = x > -math.log(2)
    # Each branch sees a harmless value where the other one is taken: no inf * 0 in the backward.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )
