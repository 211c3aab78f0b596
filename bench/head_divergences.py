"""Ways to the divergence of a student's head from a teacher's: ours, and what torch and the
packages for GPUs offer. Each takes a ``Pair`` and beta, 0 for KL(teacher || student), and returns
the mean over the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from varstream import objectives

from . import head_reference
from .case import OURS
from .head_ways import DTYPE, compiled, in_chunks


@dataclass(frozen=True)
class Pair:
    """x (N, d) and weight (V, d) of the student, which get gradients; teacher_x (N, e) and
    teacher_weight (V, e). All in bfloat16."""

    x: Tensor
    weight: Tensor
    teacher_x: Tensor
    teacher_weight: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.weight, self.teacher_x, self.teacher_weight


def draw(shape: Mapping[str, int], device: torch.device, seed: int) -> Pair:
    """A pair of heads of normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=DTYPE, device=device)

    rows, classes = shape["rows"], shape["classes"]
    widths = shape["width"], shape["teacher_width"]
    x, teacher_x = (normal(rows, width) for width in widths)
    weight, teacher_weight = (normal(classes, width).mul_(0.05) for width in widths)
    return Pair(x.requires_grad_(), weight.requires_grad_(), teacher_x, teacher_weight)


def row_divergences(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, beta: float
) -> Tensor:
    """(N,) of the rows: both heads' logits in the operands' dtype, all else in float32."""
    logp = F.log_softmax(F.linear(x, weight).float(), 1)
    logq = F.log_softmax(F.linear(teacher_x, teacher_weight).float(), 1)
    if beta == 0.0:
        return (logq.exp() * (logq - logp)).sum(1)
    middle = torch.logaddexp(logp + math.log1p(-beta), logq + math.log(beta))
    forward = (logq.exp() * (logq - middle)).sum(1)
    return beta * forward + (1.0 - beta) * (logp.exp() * (logp - middle)).sum(1)


def ours(p: Pair, beta: float) -> Tensor:
    return objectives.distillation(*p.tensors, beta=beta)


def dense(p: Pair, beta: float) -> Tensor:
    return row_divergences(*p.tensors, beta).mean()


def dense_compiled(p: Pair, beta: float) -> Any:
    return compiled(row_divergences, *p.tensors, beta).mean()


def _of_chunk(
    x: Tensor, teacher_x: Tensor, weight: Tensor, teacher_weight: Tensor, beta: float
) -> tuple[Tensor]:
    return (row_divergences(x, weight, teacher_x, teacher_weight, beta),)


def checkpointed_chunks(p: Pair, beta: float) -> Tensor:
    rows = p.x, p.teacher_x
    (found,) = in_chunks(_of_chunk, rows, p.weight, p.teacher_weight, beta)
    return found.mean()


def trl_chunked(p: Pair, beta: float) -> Any:
    """The kernel of TRL's trainers."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    x, weight, teacher_x, teacher_weight = p.tensors
    found, *_ = ChunkedDivergenceFunction.apply(
        x, weight, None, teacher_x, teacher_weight, None, beta
    )
    return found.mean()


def liger(p: Pair, beta: float) -> Any:
    """Liger's fused divergence, which has no other reduction."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return liger_fused_linear_jsd(*p.tensors, jsd_beta=beta)


WAYS: Mapping[str, Callable[[Pair, float], Any]] = {
    OURS: ours,
    "dense": dense,
    "dense_compiled": dense_compiled,
    "checkpointed_chunks": checkpointed_chunks,
    "trl_chunked": trl_chunked,
    "liger": liger,
}


def loss_and_gradients(way: Callable[[Pair, float], Any], p: Pair, beta: float) -> list[Tensor]:
    loss = way(p, beta)
    return [loss.detach(), *torch.autograd.grad(loss, (p.x, p.weight))]


def reference(p: Pair, beta: float) -> list[Tensor]:
    """The same in float32, a block of rows after the other."""
    teacher_weight = p.teacher_weight.float()

    def values(x: Tensor, weight: Tensor, teacher_x: Tensor) -> list[Tensor]:
        return [row_divergences(x, weight, teacher_x.float(), teacher_weight, beta)]

    rows = p.x.shape[0]
    upstream = torch.full((rows,), 1.0 / rows, device=p.x.device)
    (found,), gradients = head_reference.in_blocks(values, p.x, p.weight, [p.teacher_x], [upstream])
    return [found.mean(), *gradients]
