"""``varstream.objectives``: distillation against a teacher's hidden states, and two objectives over
per-token log-probabilities beside plain loops over the sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import floors, peers
from ..case import Case, Peer, Setup, Shape, floor
from .head import TOLERANCE

CLIP = 0.2
BETA = 0.1


def _dense_divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of two heads' logits (N, V), mean over rows."""
    p, q = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    if beta == 0.0:
        return (q.exp() * (q - p)).sum(1).mean()
    mixed = (p.exp() * (1 - beta) + q.exp() * beta).log()
    to_teacher = (q.exp() * (q - mixed)).sum(1)
    return (beta * to_teacher + (1 - beta) * (p.exp() * (p - mixed)).sum(1)).mean()


def _build_distillation(beta: float, shape: Shape, device: torch.device, seed: int) -> Setup:
    from varstream import objectives

    draw = torch.Generator().manual_seed(seed)
    rows, width, wide, classes = (shape[n] for n in ("rows", "width", "teacher_width", "classes"))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(device)

    x, weight = normal(rows, width), normal(classes, width) * 0.05
    teacher, teacher_weight = normal(rows, wide), normal(classes, wide) * 0.05
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def gradients(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def ours() -> list[Tensor]:
        return gradients(objectives.distillation(x, weight, teacher, teacher_weight, beta=beta))

    def dense() -> list[Tensor]:
        student, target = F.linear(x, weight), F.linear(teacher, teacher_weight)
        return gradients(_dense_divergence(student, target, beta))

    three = floors.head_products(x, weight, "zxw")
    one = floors.head_products(teacher, teacher_weight, "z")

    def products() -> None:
        three()
        one()

    logits, own = rows * classes * x.element_size(), x.nbytes + weight.nbytes
    return Setup(
        runs={"varstream": ours, "dense": dense, "gemm_floor": products},
        figures=lambda peaks, ours: {"memory_over_logits": (peaks["varstream"] - own) / logits},
        operand_bytes=own + teacher.nbytes + teacher_weight.nbytes,
    )


class Rollouts:
    """Packed log-probabilities (N,) of B sequences of up to ``seqlen`` tokens."""

    def __init__(self, shape: Shape, device: torch.device, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        seqlen, batch = shape["seqlen"], shape["batch"]
        lengths = torch.randint(max(2, seqlen // 5), seqlen + 1, (batch,), generator=draw)
        total = int(lengths.sum())
        self.lengths = lengths.tolist()
        self.cu = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
        self.logp = (-torch.rand(total, generator=draw)).to(device).requires_grad_()
        noise = torch.randn(total, generator=draw).to(device)
        self.other = self.logp.detach() + 0.2 * noise
        self.mask = (torch.rand(total, generator=draw) < 0.8).to(device)
        starts = self.cu[:-1].long()
        self.mask[starts] = True  # no sequence without a trained token
        self.advantages = torch.randn(batch, generator=draw).to(device)

    def per_sequence(self) -> list[tuple[Tensor, ...]]:
        """(logp, other, mask) of each sequence."""
        columns = (self.logp, self.other, self.mask)
        return list(zip(*(t.split(self.lengths) for t in columns), strict=True))


def _loop_grpo(o: Rollouts) -> Tensor:
    losses = []
    for (logp, old, mask), advantage in zip(o.per_sequence(), o.advantages, strict=True):
        ratio = (logp[mask] - old[mask]).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        losses.append(-torch.minimum(ratio * advantage, clipped * advantage).mean())
    return torch.stack(losses).mean()


def _loop_dpo(o: Rollouts) -> Tensor:
    rewards = [(logp[mask] - ref[mask]).sum() for logp, ref, mask in o.per_sequence()]
    pairs = zip(rewards[::2], rewards[1::2], strict=True)
    return torch.stack([-F.logsigmoid(BETA * (good - bad)) for good, bad in pairs]).mean()


def _grpo(o: Rollouts) -> Any:
    from varstream import objectives

    return objectives.grpo(
        o.logp, o.mask, o.cu, advantages=o.advantages, old_logp=o.other, epsilon=CLIP
    )


def _dpo(o: Rollouts) -> Any:
    from varstream import objectives

    return objectives.dpo(o.logp, o.mask, o.cu, ref_logp=o.other, beta=BETA)


def _build_objective(
    ours: Callable[[Rollouts], Any],
    loop: Callable[[Rollouts], Tensor],
    shape: Shape,
    device: torch.device,
    seed: int,
) -> Setup:
    o = Rollouts(shape, device, seed)

    def run(objective: Callable[[Rollouts], Any]) -> list[Tensor]:
        loss = objective(o)
        return [loss.detach(), *torch.autograd.grad(loss, [o.logp])]

    return Setup(runs={"varstream": partial(run, ours), "loop": partial(run, loop)})


def _distillation(name: str, beta: float, note: str) -> Case:
    return Case(
        f"distillation/{name}",
        "objectives.distillation",
        {"rows": 4096, "width": 512, "teacher_width": 1024, "classes": 32000},
        partial(_build_distillation, beta),
        {"rows": 37, "width": 16, "teacher_width": 24, "classes": 101},
        peers=(Peer("dense"), floor("gemm_floor")),
        reference="dense",
        tolerance=TOLERANCE,
        needs=peers.attribute("varstream.objectives", "distillation"),
        note=f"forward and backward, {note}; floor: the student's 3 products and the teacher's",
    )


def objective_case(name: str, ours: Callable[..., Any], loop: Callable[..., Tensor]) -> Case:
    """One objective beside the loop that does the same."""
    return Case(
        f"objectives/{name}",
        f"objectives.{name}",
        {"batch": 64, "seqlen": 2048},
        partial(_build_objective, ours, loop),
        {"batch": 4, "seqlen": 9},
        peers=(Peer("loop"),),
        reference="loop",
        tolerance=TOLERANCE,
        needs=peers.attribute("varstream.objectives", name),
        note="forward and backward, to the log-probabilities",
    )


CASES = (
    _distillation("forward_kl", 0.0, "KL(teacher || student)"),
    _distillation("jsd", 0.5, "Jensen-Shannon divergence"),
    objective_case("grpo", _grpo, _loop_grpo),
    objective_case("dpo", _dpo, _loop_dpo),
)
