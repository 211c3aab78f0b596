"""KTO: sequences labelled one by one as desirable or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream._checks import check_float, check_positive, check_tensor
from varstream.objectives._segments import Normalizer, average, sequences


def kto(
    logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    ref_logp: Tensor,
    labels: Tensor,
    kl: float | Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    normalizer: Normalizer = None,
) -> Tensor:
    """Kahneman-Tversky optimisation of unpaired sequences.

    With ``r_i = sum_t (logp_t - ref_logp_t)`` over the trained tokens of sequence i and the
    reference point ``z = max(kl, 0)``, the loss of a desirable sequence is
    ``desirable_weight * (1 - sigmoid(beta (r_i - z)))``, of an undesirable one
    ``undesirable_weight * (1 - sigmoid(beta (z - r_i)))``; they are summed over the B sequences and
    divided by B.

    Args:
        logp: ``(N,)`` log-probabilities of the packed tokens; float64, float32, bfloat16, float16.
        mask: ``(N,)`` bool, true at trained tokens; other rows are never used and get zero
            gradients, even if they hold NaN.
        cu_seqlens: ``(B+1,)`` int32.
        ref_logp: ``(N,)`` under the reference model, floating; no gradient.
        labels: ``(B,)`` bool, true for desirable sequences.
        kl: estimate of KL(policy || reference), a number or a tensor of one element; no gradient.
            The paper's is the mean of ``r`` over mismatched prompt and completion pairs of the
            batch; average it over ranks first. 0 leaves the reference point out.
        beta: strength of the pull to the reference, above 0.
        desirable_weight: weight of desirable sequences, not negative.
        undesirable_weight: weight of undesirable sequences, not negative.
        normalizer: divisor in place of B, such as the sequences of all micro-batches and ranks: a
            number or a tensor of one element.

    Returns:
        Scalar in float32 (float64 for float64 ``logp``). A sequence without trained tokens has
        ``r = 0`` and no gradient; B = 0 gives 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a wrong shape, dtype, device or value; values of tensors are checked on the CPU.

    Source: KTO, arXiv 2402.01306. TRL: ``KTOTrainer`` with ``loss_type="kto"``.
    """
    seq = sequences(logp, mask, cu_seqlens)
    beta = check_positive("beta", beta)
    desirable = check_float("desirable_weight", desirable_weight, low=0.0)
    undesirable = check_float("undesirable_weight", undesirable_weight, low=0.0)
    device, shape = seq.logp.device, (seq.batch,)
    check_tensor("labels", labels, shape=shape, dtypes=(torch.bool,), device=device, layout="(B,)")
    point = _reference_point(kl, seq.logp)
    advantage = seq.sum(seq.logp - seq.constant("ref_logp", ref_logp)) - point  # (B,)
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits where it is small.
    losses = torch.where(
        labels,
        desirable * torch.sigmoid(-beta * advantage),
        undesirable * torch.sigmoid(beta * advantage),
    )
    return average(losses.sum(), seq.batch, normalizer)


def _reference_point(kl: Any, like: Tensor) -> Tensor:
    """``max(kl, 0)`` () in the dtype of ``like``, without gradient."""
    if not isinstance(kl, Tensor):
        kl = torch.full((), check_float("kl", kl), dtype=like.dtype, device=like.device)
    elif kl.numel() != 1:
        raise ValueError(f"kl must have one element, got shape {tuple(kl.shape)}")
    return kl.detach().reshape(()).to(like).clamp(min=0)
