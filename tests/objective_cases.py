"""Packed data and independently written formulas of the objectives' tests.

A formula sees one sequence after the other as plain lists of trained tokens and divides only where
there is something to divide by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from cases import cu_seqlens
from torch import Tensor

from varstream import objectives

LENGTHS = {
    "none": [],
    "two_empty": [0, 0],
    "ones": [1, 1, 1, 1],
    "ragged": [5, 3, 0, 7, 2, 1],
    "empty_members": [4, 0, 0, 6, 3, 3],
    "primes": [2, 3, 5, 7, 11, 13],
}


@dataclass
class Batch:
    """logp and its companions (N,), mask (N,), cu_seqlens (B+1,), one advantage and label each."""

    lengths: list[int]
    mask: Tensor
    cu: Tensor
    logp: Tensor
    ref: Tensor
    old: Tensor
    token_advantage: Tensor
    token_weight: Tensor
    nll_mask: Tensor
    advantage: Tensor = field(repr=False)
    weight: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    def sequences(self, values: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """The trained entries of ``values`` (N,), a tensor per sequence."""
        mask = self.mask if mask is None else mask
        return [values[a:b][mask[a:b]] for a, b in pairwise(self.cu.tolist())]


def batch(lengths: list[int], trained: float = 0.7, dtype: torch.dtype = torch.float64) -> Batch:
    n, b = sum(lengths), len(lengths)

    def logprobs() -> Tensor:
        return -torch.rand(n, dtype=torch.float64).mul(3).to(dtype)

    logp = logprobs()
    return Batch(
        lengths,
        torch.rand(n) < trained,
        cu_seqlens(lengths),
        logp.requires_grad_(),
        logprobs(),
        (logp.detach() + 0.3 * torch.randn(n, dtype=torch.float64)).to(dtype),
        torch.randn(n, dtype=dtype),
        torch.rand(n, dtype=dtype) + 0.5,
        torch.rand(n) < 0.8,
        torch.randn(b, dtype=dtype),
        torch.rand(b, dtype=dtype) + 0.5,
        torch.rand(b) < 0.5,
    )


# --- parts of the formulas ------------------------------------------------------------------------


def total(values: list[Any], like: Tensor) -> Tensor:
    """Sum of scalars, 0 with a graph where there are none."""
    return sum(values, like.new_zeros(()) * like.sum())


def mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, values.numel())


def softplus(x: Tensor) -> Tensor:
    """-log sigmoid(-x)."""
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def pair_loss(d: Batch, score: list[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    losses = [loss(score[i] - score[i + 1]) for i in range(0, len(score), 2)]
    return total(losses, d.logp) / max(1, len(losses))


def chosen_nll(d: Batch, mask: Tensor | None = None) -> Tensor:
    chosen = d.sequences(d.logp, mask)[::2]
    return total([-s.sum() for s in chosen], d.logp) / max(1, sum(s.numel() for s in chosen))


def log_ratios(d: Batch) -> list[Tensor]:
    return [a - b for a, b in zip(d.sequences(d.logp), d.sequences(d.ref), strict=True)]


def smoothed(beta: float, eps: float) -> Callable[[Tensor], Tensor]:
    return lambda m: (1 - eps) * softplus(-beta * m) + eps * softplus(beta * m)


def log_odds(logp: Tensor) -> Tensor:
    p = mean(logp).exp()
    return torch.log(p / (1 - p))


def odds_ratio(d: Batch, beta: float, mask: Tensor | None = None) -> Tensor:
    s = d.sequences(d.logp)
    terms = [
        -softplus(log_odds(s[i + 1]) - log_odds(s[i]))
        for i in range(0, len(s), 2)
        if s[i].numel() and s[i + 1].numel()
    ]
    return chosen_nll(d, mask) - beta * total(terms, d.logp) / max(1, len(s) // 2)


def kto_loss(d: Batch, beta: float, z: float, good: float, bad: float) -> Tensor:
    losses = []
    for r, desirable in zip(log_ratios(d), d.labels.tolist(), strict=True):
        gain = beta * (r.sum() - z)
        losses.append(good * (1 - gain.sigmoid()) if desirable else bad * (1 - (-gain).sigmoid()))
    return total(losses, d.logp) / max(1, len(losses))


def policy_tokens(
    d: Batch,
    *,
    advantage: Tensor,
    old: bool = True,
    low: float = 0.2,
    high: float = 0.2,
    delta: float = float("inf"),
    beta: float = 0.0,
    kl: str = "k3",
    correction: bool = False,
    weight: Tensor | None = None,
    level: str = "token",
) -> list[Tensor]:
    """Per-token losses of every sequence."""
    result = []
    olds = d.sequences(d.old if old else d.logp.detach())
    per_token = advantage.shape[0] == d.rows and advantage.shape[0] != len(d.lengths)
    rows = d.sequences(advantage) if per_token else advantage
    for i, (new, before, ref) in enumerate(
        zip(d.sequences(d.logp), olds, d.sequences(d.ref), strict=True)
    ):
        ratio = (new - before).exp()
        if level == "sequence":
            s = mean(new - before).exp()
            ratio = s.detach() * (new - new.detach()).exp() if per_token else s.expand_as(new)
        if level == "cispo":
            losses = -ratio.detach().clamp(1 - low, 1 + high) * rows[i] * new
        else:
            clipped = ratio.clamp(1 - low, 1 + high)
            losses = -torch.minimum(ratio.clamp(max=delta) * rows[i], clipped * rows[i])
        if weight is not None:
            losses = losses * (weight[i] if weight.shape[0] == len(d.lengths) else 1.0)
            if weight.shape[0] != len(d.lengths):
                losses = losses * d.sequences(weight)[i]
        gap = ref - new
        term = {"k1": -gap, "k2": 0.5 * gap**2, "k3": gap.exp() - 1 - gap}[kl]
        result.append(losses + beta * term * (ratio if correction else 1.0))
    return result


def by_sequence(d: Batch, **options: Any) -> Tensor:
    losses = policy_tokens(d, **options)
    return total([mean(x) for x in losses], d.logp) / max(1, len(losses))


def by_token(d: Batch, **options: Any) -> Tensor:
    losses = policy_tokens(d, **options)
    return total([x.sum() for x in losses], d.logp) / max(1, sum(x.numel() for x in losses))


def by_constant(d: Batch, length: float, **options: Any) -> Tensor:
    losses = policy_tokens(d, **options)
    return total([x.sum() for x in losses], d.logp) / max(1, len(losses)) / length


# --- every objective beside its formula -----------------------------------------------------------

Call = Callable[[Tensor, Batch], Tensor]
Case = tuple[Call, Callable[[Batch], Tensor]]


def packed(function: Callable[..., Tensor], **options: Any) -> Call:
    """Call an objective; string options name fields of the batch."""

    def call(logp: Tensor, d: Batch) -> Tensor:
        given = {k: getattr(d, v[1:]) if _is_field(v) else v for k, v in options.items()}
        return function(logp, d.mask, d.cu, **given)

    return call


def _is_field(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("@")


o = objectives
POLICY = {
    "advantages": "@advantage",
    "old_logp": "@old",
    "ref_logp": "@ref",
    "beta": 0.05,
    "token_weight": "@weight",
}
TOKENS = POLICY | {"advantages": "@token_advantage", "token_weight": "@token_weight"}


def policy_formula(d: Batch, form: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    return form(d, *args, advantage=d.advantage, weight=d.weight, beta=0.05, **options)


def token_formula(d: Batch, form: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    return form(d, *args, advantage=d.token_advantage, weight=d.token_weight, beta=0.05, **options)


CASES: dict[str, Case] = {
    "sft": (
        lambda x, d: o.sft(x, d.mask),
        lambda d: -d.logp[d.mask].sum() / max(1, int(d.mask.sum())),
    ),
    "dft": (
        lambda x, d: o.dft(x, d.mask),
        lambda d: -(d.logp.exp().detach() * d.logp)[d.mask].sum() / max(1, int(d.mask.sum())),
    ),
    "dpo": (
        packed(o.dpo, ref_logp="@ref", beta=0.3),
        lambda d: pair_loss(d, [r.sum() for r in log_ratios(d)], smoothed(0.3, 0.0)),
    ),
    "dpo_smoothed": (
        packed(o.dpo, ref_logp="@ref", label_smoothing=0.2),
        lambda d: pair_loss(d, [r.sum() for r in log_ratios(d)], smoothed(0.1, 0.2)),
    ),
    "dpo_averaged": (
        packed(o.dpo, ref_logp="@ref", beta=2.0, average_log_prob=True),
        lambda d: pair_loss(d, [mean(r) for r in log_ratios(d)], smoothed(2.0, 0.0)),
    ),
    "ipo": (
        packed(o.ipo, ref_logp="@ref", beta=0.2),
        lambda d: pair_loss(d, [mean(r) for r in log_ratios(d)], lambda m: (m - 2.5) ** 2),
    ),
    "ipo_sums": (
        packed(o.ipo, ref_logp="@ref", beta=0.2, average_log_prob=False),
        lambda d: pair_loss(d, [r.sum() for r in log_ratios(d)], lambda m: (m - 2.5) ** 2),
    ),
    "simpo": (
        packed(o.simpo),
        lambda d: pair_loss(d, [mean(s) for s in d.sequences(d.logp)], margin_loss(2.0, 0.5, 0.0)),
    ),
    "cpo_simpo": (
        packed(o.simpo, beta=1.5, gamma=0.8, label_smoothing=0.1, alpha=0.7),
        lambda d: (
            pair_loss(d, [mean(s) for s in d.sequences(d.logp)], margin_loss(1.5, 0.8, 0.1))
            + 0.7 * chosen_nll(d)
        ),
    ),
    "cpo": (
        packed(o.cpo, beta=0.2, alpha=0.4, label_smoothing=0.1),
        lambda d: (
            pair_loss(d, [s.sum() for s in d.sequences(d.logp)], smoothed(0.2, 0.1))
            + 0.4 * chosen_nll(d)
        ),
    ),
    "orpo": (packed(o.orpo), lambda d: odds_ratio(d, 0.1)),
    "orpo_nll_mask": (
        packed(o.orpo, beta=0.5, nll_mask="@nll_mask"),
        lambda d: odds_ratio(d, 0.5, d.nll_mask),
    ),
    "kto": (
        packed(o.kto, ref_logp="@ref", labels="@labels", kl=0.4),
        lambda d: kto_loss(d, 0.1, 0.4, 1.0, 1.0),
    ),
    "kto_weights": (
        packed(
            o.kto,
            ref_logp="@ref",
            labels="@labels",
            kl=torch.tensor([-0.4]),
            beta=0.5,
            desirable_weight=1.3,
            undesirable_weight=0.6,
        ),
        lambda d: kto_loss(d, 0.5, 0.0, 1.3, 0.6),
    ),
    "grpo": (packed(o.grpo, **POLICY), lambda d: policy_formula(d, by_sequence)),
    "grpo_on_policy": (
        packed(o.grpo, advantages="@advantage"),
        lambda d: by_sequence(d, advantage=d.advantage, old=False),
    ),
    "grpo_tokens": (packed(o.grpo, **TOKENS), lambda d: token_formula(d, by_sequence)),
    "grpo_two_sided": (
        packed(o.grpo, **POLICY, epsilon=0.1, epsilon_high=0.15, delta=1.2),
        lambda d: policy_formula(d, by_sequence, low=0.1, high=0.15, delta=1.2),
    ),
    "grpo_k1": (
        packed(o.grpo, **POLICY, kl_estimator="k1", kl_correction=True),
        lambda d: policy_formula(d, by_sequence, kl="k1", correction=True),
    ),
    "grpo_k2": (
        packed(o.grpo, **POLICY, kl_estimator="k2"),
        lambda d: policy_formula(d, by_sequence, kl="k2"),
    ),
    "dapo": (
        packed(o.dapo, **POLICY, epsilon_high=0.28),
        lambda d: policy_formula(d, by_token, high=0.28),
    ),
    "dr_grpo": (
        packed(o.dr_grpo, **POLICY, max_length=11, kl_correction=True),
        lambda d: policy_formula(d, by_constant, 11, correction=True),
    ),
    "cispo": (
        packed(o.cispo, **TOKENS, epsilon_high=0.2),
        lambda d: token_formula(d, by_token, level="cispo", low=1.0, high=0.2),
    ),
    "cispo_sequence": (
        packed(o.cispo, **POLICY, epsilon=0.1, aggregation="sequence"),
        lambda d: policy_formula(d, by_sequence, level="cispo", low=0.1, high=4.0),
    ),
    "gspo": (
        packed(o.gspo, **POLICY, epsilon=0.05, epsilon_high=0.1),
        lambda d: policy_formula(d, by_sequence, level="sequence", low=0.05, high=0.1),
    ),
    "gspo_defaults": (
        packed(o.gspo, **POLICY),
        lambda d: policy_formula(d, by_sequence, level="sequence", low=3e-4, high=4e-4),
    ),
    "gspo_tokens": (
        packed(o.gspo, **TOKENS, epsilon=0.05, epsilon_high=0.1),
        lambda d: token_formula(d, by_sequence, level="sequence", low=0.05, high=0.1),
    ),
}


def margin_loss(beta: float, gamma: float, eps: float) -> Callable[[Tensor], Tensor]:
    return lambda m: smoothed(1.0, eps)(beta * m - gamma)
