"""Policy-gradient objectives of reinforcement learning: GRPO and its relatives.

All share one per-token loss and differ in the ratio it uses and in what it is averaged over:

    l_t = w_t * surrogate(ratio_t, A_t) + beta * KL_t,    ratio_t = exp(logp_t - old_logp_t)
    clipped surrogate: -min(min(ratio, delta) A, clip(ratio, 1 - epsilon, 1 + epsilon_high) A)

| function | ratio | divided by | ``normalizer`` replaces |
| --- | --- | --- | --- |
| ``grpo`` | token, clipped | own trained tokens, then sequences | number of sequences |
| ``dapo`` | token, clipped | all trained tokens | number of tokens |
| ``dr_grpo`` | token, clipped | sequences times ``max_length`` | number of sequences |
| ``cispo`` | token, a bounded constant | all trained tokens (or as ``grpo``) | that number |
| ``gspo`` | sequence, clipped | own trained tokens, then sequences | number of sequences |

A sequence without trained tokens adds 0 and counts as a sequence; without any trained token, or
with B = 0, the loss is 0 and all gradients are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varstream._checks import check_bool, check_float, check_positive
from varstream.objectives._segments import Normalizer, Sequences, average, sequences

KL_ESTIMATORS = ("k1", "k2", "k3")


def grpo(
    logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    advantages: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    kl_estimator: str = "k3",
    kl_correction: bool = False,
    token_weight: Tensor | None = None,
    normalizer: Normalizer = None,
) -> Tensor:
    """Group-relative policy optimisation: per-token losses are averaged over the trained tokens of
    each sequence, then over the B sequences.

    Args:
        logp: ``(N,)`` log-probabilities of the packed tokens, as ``vs.token_logprobs`` gives them;
            float64, float32, bfloat16 or float16.
        mask: ``(N,)`` bool, true at trained tokens; other rows of any ``(N,)`` argument are never
            used and get zero gradients, even if they hold NaN.
        cu_seqlens: ``(B+1,)`` int32.
        advantages: ``(B,)`` or ``(N,)``, floating, taken as ``(B,)`` if B = N; no gradient.
        old_logp: ``(N,)`` under the policy that sampled, floating, no gradient. ``None``:
            on-policy, the ratio is 1 with the gradient of ``logp``.
        ref_logp: ``(N,)`` under the reference model, floating, no gradient; needed by ``beta``.
        beta: weight of the KL term, not negative.
        epsilon: the ratio is clipped at ``1 - epsilon`` from below, not negative.
        epsilon_high: and at ``1 + epsilon_high`` from above; ``epsilon`` by default.
        delta: bound of the unclipped ratio (two-sided clipping), above ``1 + epsilon_high``; it
            limits the loss of negative advantages.
        kl_estimator: with ``d = ref_logp - logp``, ``"k3"``: ``e^d - d - 1``, ``"k2"``:
            ``d^2 / 2``, ``"k1"``: ``-d``, whose gradient is 0 on average over on-policy samples.
        kl_correction: multiply the KL term by the ratio, which makes it unbiased off-policy.
        token_weight: ``(B,)`` or ``(N,)``, floating, taken as ``(B,)`` if B = N: factors of the
            surrogate (not of the KL term), such as truncated importance weights between trainer and
            sampler or a mask of off-policy sequences; no gradient.
        normalizer: divisor in place of B, such as the sequences of all micro-batches and ranks: a
            number or a tensor of one element.

    Returns:
        Scalar in float32 (float64 for float64 ``logp``).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a wrong shape, dtype, device or value, or ``beta`` without ``ref_logp``; values
            of tensors are checked on the CPU.

    Source: GRPO, arXiv 2402.03300; k1 to k3, J. Schulman, "Approximating KL divergence", 2020;
    two-sided clipping, INTELLECT-2, arXiv 2505.07291; ``kl_correction``, DeepSeek-V3.2, arXiv
    2512.02556. TRL: ``GRPOTrainer`` with ``loss_type="grpo"``; its ``use_bias_correction_kl`` is
    ``kl_correction``.
    """
    call = _check(sequences(logp, mask, cu_seqlens), advantages, old_logp, ref_logp, token_weight)
    kl = _kl_term(call, beta, kl_estimator, kl_correction)
    losses = _clipped(call, epsilon, epsilon_high, delta) + kl
    return average(call.seq.mean(losses).sum(), call.seq.batch, normalizer)


def dapo(
    logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    advantages: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    kl_estimator: str = "k3",
    kl_correction: bool = False,
    token_weight: Tensor | None = None,
    normalizer: Normalizer = None,
) -> Tensor:
    """GRPO's per-token losses averaged over all trained tokens, whatever sequence they are in.

    Arguments, result and errors as in ``grpo``, but ``normalizer`` replaces the number of trained
    tokens in ``mask``: give those of all micro-batches and ranks. The paper sets
    ``epsilon_high=0.28``.

    Source: DAPO, arXiv 2503.14476. TRL: ``GRPOTrainer`` with ``loss_type="dapo"``; without
    ``normalizer``, ``loss_type="bnpo"``.
    """
    call = _check(sequences(logp, mask, cu_seqlens), advantages, old_logp, ref_logp, token_weight)
    kl = _kl_term(call, beta, kl_estimator, kl_correction)
    losses = _clipped(call, epsilon, epsilon_high, delta) + kl
    return average(call.seq.keep(losses).sum(), call.seq.count, normalizer)


def dr_grpo(
    logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    advantages: Tensor,
    max_length: int | float,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    kl_estimator: str = "k3",
    kl_correction: bool = False,
    token_weight: Tensor | None = None,
    normalizer: Normalizer = None,
) -> Tensor:
    """GRPO's per-token losses summed, over B times a constant length: no bias by a sequence's own.

    Arguments, result and errors as in ``grpo``, and ``max_length``: the constant, above 0, such as
    the most tokens a completion may have.

    Source: Dr. GRPO, arXiv 2503.20783. TRL: ``GRPOTrainer`` with ``loss_type="dr_grpo"``,
    ``max_length`` its ``max_completion_length``.
    """
    call = _check(sequences(logp, mask, cu_seqlens), advantages, old_logp, ref_logp, token_weight)
    length = check_positive("max_length", max_length)
    kl = _kl_term(call, beta, kl_estimator, kl_correction)
    losses = _clipped(call, epsilon, epsilon_high, delta) + kl
    return average(call.seq.keep(losses).sum() / length, call.seq.batch, normalizer)


def cispo(
    logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    advantages: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 1.0,
    epsilon_high: float = 4.0,
    aggregation: str = "token",
    kl_estimator: str = "k3",
    kl_correction: bool = False,
    token_weight: Tensor | None = None,
    normalizer: Normalizer = None,
) -> Tensor:
    """Clipped importance weights, ``-sg(clip(ratio, 1 - epsilon, 1 + epsilon_high)) A logp``: every
    token keeps a gradient.

    Arguments, result and errors as in ``grpo``, except:

    Args:
        epsilon: the default 1 sets no lower bound, as in the paper.
        epsilon_high: the weight is at most ``1 + epsilon_high``.
        aggregation: ``"token"`` averages over all trained tokens, ``"sequence"`` as ``grpo``.
        normalizer: divisor in place of the number of trained tokens, or of sequences.

    Source: MiniMax-M1, arXiv 2506.13585. TRL: ``GRPOTrainer`` with ``loss_type="cispo"``, whose
    ``epsilon_high`` is the bound itself: its 5.0 is 4.0 here.
    """
    if aggregation not in ("token", "sequence"):
        raise ValueError(f"aggregation must be token or sequence, got {aggregation!r}")
    call = _check(sequences(logp, mask, cu_seqlens), advantages, old_logp, ref_logp, token_weight)
    low, high = _clip_range(epsilon, epsilon_high)
    factor = call.ratio.detach().clamp(low, high)
    losses = -call.weighted(factor * call.advantages * call.seq.logp)
    losses = losses + _kl_term(call, beta, kl_estimator, kl_correction)
    if aggregation == "sequence":
        return average(call.seq.mean(losses).sum(), call.seq.batch, normalizer)
    return average(call.seq.keep(losses).sum(), call.seq.count, normalizer)


def gspo(
    logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *,
    advantages: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 3e-4,
    epsilon_high: float | None = 4e-4,
    delta: float | None = None,
    kl_estimator: str = "k3",
    token_weight: Tensor | None = None,
    normalizer: Normalizer = None,
) -> Tensor:
    """GRPO with one ratio per sequence, ``s = exp(mean_t (logp_t - old_logp_t))``.

    Arguments, result and errors as in ``grpo``; the ratio is much nearer to 1 than a token's, hence
    the paper's narrow clipping range. Advantages or weights that differ within a sequence follow
    GSPO-token: token t has the ratio ``sg(s) p_t / sg(p_t)``, the same value and, where they
    don't differ, the same gradient.

    Source: GSPO, arXiv 2507.18071. TRL: ``GRPOTrainer`` with ``loss_type="grpo"`` and
    ``importance_sampling_level="sequence"``.
    """
    seq = sequences(logp, mask, cu_seqlens)
    call = _check(seq, advantages, old_logp, ref_logp, token_weight)
    constant = seq.logp.detach()
    level = seq.spread(seq.mean(call.log_ratio.detach()))
    call = _Call(seq, level + (seq.logp - constant), call.advantages, call.ref_logp, call.weight)
    losses = _clipped(call, epsilon, epsilon_high, delta) + _kl_term(
        call, beta, kl_estimator, False
    )
    return average(seq.mean(losses).sum(), seq.batch, normalizer)


# --- parts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """Checked tensors of an objective, one value a row."""

    seq: Sequences
    log_ratio: Tensor  # (N,) with gradient
    advantages: Tensor  # (N,)
    ref_logp: Tensor | None  # (N,)
    weight: Tensor | None  # (N,)

    @property
    def ratio(self) -> Tensor:
        return self.log_ratio.exp()

    def weighted(self, losses: Tensor) -> Tensor:
        return losses if self.weight is None else losses * self.weight


def _check(
    seq: Sequences, advantages: Any, old_logp: Any, ref_logp: Any, token_weight: Any
) -> _Call:
    old = seq.logp.detach() if old_logp is None else seq.constant("old_logp", old_logp)
    return _Call(
        seq,
        seq.logp - old,
        seq.per_sequence("advantages", advantages),
        None if ref_logp is None else seq.constant("ref_logp", ref_logp),
        None if token_weight is None else seq.per_sequence("token_weight", token_weight),
    )


def _clip_range(epsilon: Any, epsilon_high: Any) -> tuple[float, float]:
    low = check_float("epsilon", epsilon, low=0.0)
    high = low if epsilon_high is None else check_float("epsilon_high", epsilon_high, low=0.0)
    return 1 - low, 1 + high


def _clipped(call: _Call, epsilon: Any, epsilon_high: Any, delta: Any) -> Tensor:
    """Weighted clipped surrogate loss (N,)."""
    low, high = _clip_range(epsilon, epsilon_high)
    ratio = call.ratio
    clipped = ratio.clamp(low, high)
    if delta is not None:
        bound = check_float("delta", delta)
        if bound <= high:
            raise ValueError(f"delta must be above 1 + epsilon_high = {high}, got {delta}")
        ratio = ratio.clamp(max=bound)
    return -call.weighted(torch.minimum(ratio * call.advantages, clipped * call.advantages))


def _kl_term(call: _Call, beta: Any, estimator: Any, correction: Any) -> Tensor | float:
    """``beta`` times the estimate of KL(policy || reference), (N,), or 0 without ``beta``."""
    beta = check_float("beta", beta, low=0.0)
    correction = check_bool("kl_correction", correction)
    if estimator not in KL_ESTIMATORS:
        names = ", ".join(KL_ESTIMATORS)
        raise ValueError(f"kl_estimator must be one of {names}, got {estimator!r}")
    if beta == 0:
        return 0.0
    if call.ref_logp is None:
        raise ValueError(f"ref_logp is needed with beta={beta}, got None")
    d = call.ref_logp - call.seq.logp
    kl = {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(d) - d}
    term = beta * kl[estimator]()
    return term * call.ratio if correction else term
