"""Likelihood objectives over single tokens: supervised fine-tuning and its dynamic form."""

from __future__ import annotations

from torch import Tensor

from varstream.objectives._segments import Normalizer, average, tokens


def sft(logp: Tensor, mask: Tensor, *, normalizer: Normalizer = None) -> Tensor:
    """Negative log-likelihood: ``-sum_t logp_t / D`` over trained tokens.

    Args:
        logp: ``(N,)`` log-probabilities of the packed tokens, as ``vs.token_logprobs`` gives them;
            float64, float32, bfloat16 or float16.
        mask: ``(N,)`` bool, true at trained tokens; other rows are never used and get zero
            gradients, even if they hold NaN.
        normalizer: ``D``, a number or a tensor of one element on any device, such as the trained
            tokens of all micro-batches and ranks; by default the trained tokens in ``mask``.

    Returns:
        Scalar in float32 (float64 for float64 ``logp``); 0 without trained tokens.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a wrong shape, dtype or device, or a ``normalizer`` not above 0 (its value is
            checked on the CPU).

    TRL: ``SFTTrainer`` with ``loss_type="nll"``, ``normalizer`` its ``num_items_in_batch``.
    Where only this loss is wanted, ``vs.linear_cross_entropy`` saves one matrix product in four.
    """
    rows = tokens(logp, mask)
    return average(-rows.logp.sum(), rows.count, normalizer)


def dft(logp: Tensor, mask: Tensor, *, normalizer: Normalizer = None) -> Tensor:
    """Dynamic fine-tuning: ``-sum_t sg(p_t) logp_t / D``, ``p = exp(logp)`` without gradient.

    Arguments, result, errors and the rule for no trained tokens as in ``sft``.

    Source: Dynamic Fine-Tuning, arXiv 2508.05629. TRL: ``SFTTrainer`` with ``loss_type="dft"``.
    """
    rows = tokens(logp, mask)
    # exp(0) = 1 at untrained rows meets logp 0 there.
    return average(-(rows.logp.detach().exp() * rows.logp).sum(), rows.count, normalizer)
