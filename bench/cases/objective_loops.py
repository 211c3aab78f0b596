"""The other objectives over per-token log-probabilities, each beside a plain loop over the
sequences; ``grpo`` and ``dpo`` are in ``objectives``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from varstream import objectives as vo

from .objectives import BETA, CLIP, Rollouts, objective_case

# What a sequence's trained log-probabilities are multiplied with before a sigmoid: sums over
# thousands of tokens would saturate it with more.
SUM_BETA = 0.01


def _trained(o: Rollouts) -> list[Tensor]:
    """Each sequence's trained log-probabilities."""
    return [logp[mask] for logp, _, mask in o.per_sequence()]


def _ratios(o: Rollouts) -> list[Tensor]:
    """Each sequence's trained log-ratios to the other model."""
    return [logp[mask] - other[mask] for logp, other, mask in o.per_sequence()]


def _over_pairs(scores: list[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    pairs = zip(scores[::2], scores[1::2], strict=True)
    return torch.stack([loss(good - bad) for good, bad in pairs]).mean()


def _chosen(o: Rollouts) -> Tensor:
    """Mean negative log-likelihood of the chosen sequences' tokens."""
    return -torch.cat(_trained(o)[::2]).mean()


def _loop_ipo(o: Rollouts) -> Tensor:
    return _over_pairs([r.mean() for r in _ratios(o)], lambda d: (d - 0.5 / BETA).square())


def _loop_simpo(o: Rollouts) -> Tensor:
    return _over_pairs([s.mean() for s in _trained(o)], lambda d: -F.logsigmoid(2.0 * d - 0.5))


def _loop_cpo(o: Rollouts) -> Tensor:
    sums = [s.sum() for s in _trained(o)]
    return _over_pairs(sums, lambda d: -F.logsigmoid(SUM_BETA * d)) + _chosen(o)


def _loop_orpo(o: Rollouts) -> Tensor:
    means = [s.mean() for s in _trained(o)]
    odds = [m - torch.log1p(-m.exp()) for m in means]
    return _chosen(o) - BETA * _over_pairs(odds, F.logsigmoid)


def _labels(o: Rollouts) -> Tensor:
    return o.advantages > 0


def _loop_kto(o: Rollouts) -> Tensor:
    losses = []
    for ratio, desirable in zip(_ratios(o), _labels(o).tolist(), strict=True):
        gain = BETA * (ratio.sum() - 0.5)
        losses.append(1 - (gain if desirable else -gain).sigmoid())
    return torch.stack(losses).mean()


def _clipped(o: Rollouts) -> list[Tensor]:
    """Each sequence's token losses under PPO's clipping."""
    losses = []
    for log_ratio, advantage in zip(_ratios(o), o.advantages, strict=True):
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        losses.append(-torch.minimum(ratio * advantage, clipped * advantage))
    return losses


def _loop_dr_grpo(o: Rollouts) -> Tensor:
    return torch.stack([x.sum() for x in _clipped(o)]).mean() / max(o.lengths)


def _loop_cispo(o: Rollouts) -> Tensor:
    losses = []
    for logp, log_ratio, advantage in zip(_trained(o), _ratios(o), o.advantages, strict=True):
        weight = log_ratio.detach().exp().clamp(1 - CLIP, 1 + CLIP)
        losses.append(-weight * advantage * logp)
    return torch.cat(losses).mean()


def _loop_gspo(o: Rollouts) -> Tensor:
    losses = []
    for log_ratio, advantage in zip(_ratios(o), o.advantages, strict=True):
        ratio = log_ratio.mean().exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        losses.append(-torch.minimum(ratio * advantage, clipped * advantage))
    return torch.stack(losses).mean()


def _policy(function: Callable[..., Tensor], o: Rollouts, **options: float) -> Tensor:
    given = {"advantages": o.advantages, "old_logp": o.other, "epsilon": CLIP, **options}
    return function(o.logp, o.mask, o.cu, **given)


def _dr_grpo(o: Rollouts) -> Tensor:
    return _policy(vo.dr_grpo, o, max_length=max(o.lengths))


def _both_sides(function: Callable[..., Tensor]) -> Callable[[Rollouts], Tensor]:
    """For the objectives whose upper bound has a default of its own."""
    return partial(_policy, function, epsilon_high=CLIP)


def _kto(o: Rollouts) -> Tensor:
    return vo.kto(o.logp, o.mask, o.cu, ref_logp=o.other, labels=_labels(o), kl=0.5, beta=BETA)


def _loop_dft(o: Rollouts) -> Tensor:
    return torch.cat([-s.detach().exp() * s for s in _trained(o)]).mean()


CASES = (
    objective_case(
        "sft", lambda o: vo.sft(o.logp, o.mask), lambda o: -torch.cat(_trained(o)).mean()
    ),
    objective_case("dft", lambda o: vo.dft(o.logp, o.mask), _loop_dft),
    objective_case(
        "ipo", lambda o: vo.ipo(o.logp, o.mask, o.cu, ref_logp=o.other, beta=BETA), _loop_ipo
    ),
    objective_case("simpo", lambda o: vo.simpo(o.logp, o.mask, o.cu), _loop_simpo),
    objective_case("cpo", lambda o: vo.cpo(o.logp, o.mask, o.cu, beta=SUM_BETA), _loop_cpo),
    objective_case("orpo", lambda o: vo.orpo(o.logp, o.mask, o.cu, beta=BETA), _loop_orpo),
    objective_case("kto", _kto, _loop_kto),
    objective_case("dapo", partial(_policy, vo.dapo), lambda o: torch.cat(_clipped(o)).mean()),
    objective_case("dr_grpo", _dr_grpo, _loop_dr_grpo),
    objective_case("cispo", _both_sides(vo.cispo), _loop_cispo),
    objective_case("gspo", _both_sides(vo.gspo), _loop_gspo),
)
