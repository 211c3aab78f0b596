"""The summed loss of a sharded head: its loop over chunks and its autograd formula.

The gradient of the sum is formed together with the loss, as on one rank: three products a chunk and
no second walk over the rows. All collectives are in the forward; the backward multiplies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from varstream.ops._head import may_overwrite
from varstream.parallel._checks import ShardCall
from varstream.parallel._gradients import ShardGradients, add_chunk, finished
from varstream.parallel._softmax import ChunkValues, ShardSoftmax, shard_sums
from varstream.reference.cross_entropy import Loss, Scales
from varstream.reference.head_gradient import Upstream
from varstream.reference.head_rows import (
    Rows,
    check_targets,
    columns,
    only,
    select_rows,
    take,
    take_any,
)
from varstream.reference.token_logprobs import Wanted


class Summed(NamedTuple):
    """Results of ``loss_sum``; only the first is differentiable."""

    loss_sum: Tensor  # () acc dtype
    lse_sq_sum: Tensor  # () sum of lse^2 over rows with a valid target
    logp: Tensor  # like target, empty without metrics
    argmax: Tensor  # (N,) int64, empty without metrics


def loss_sum(shard: ShardCall, scales: Scales, metrics: bool) -> Summed:
    """The summed loss of checked arguments; forms the gradients autograd will ask for."""
    call, recording = shard.call, torch.is_grad_enabled()
    operands = call.input, call.linear_weight, call.linear_bias
    needs = tuple(t is not None and recording and t.requires_grad for t in operands)
    return Summed(*_LossSum.apply(*operands, shard, scales, metrics, needs))


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shard: ShardCall,
        scales: Scales,
        metrics: bool,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        found = _walk(shard, scales, metrics, needs)
        ctx.dtype, ctx.needs = x.dtype, needs
        ctx.save_for_backward(found.loss_sum, found.input, found.weight, found.bias)
        rest = found.lse_sq_sum, found.logp, found.argmax
        ctx.mark_non_differentiable(*rest)
        return found.loss_sum, *rest

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        total, *grads = ctx.saved_tensors
        wanted = [
            _scaled(grad, upstream, ctx.dtype) if need else None
            for need, grad in zip(ctx.needs, grads, strict=True)
        ]
        return *finished("parallel.linear_cross_entropy", wanted, total), None, None, None, None


def _scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient times the upstream scalar, in place when nobody can ask for it again."""
    with torch.no_grad():
        return (grad.mul_(upstream) if may_overwrite(grad) else grad * upstream).to(dtype)


# --- the loop -------------------------------------------------------------------------------------


def _walk(shard: ShardCall, scales: Scales, metrics: bool, needs: tuple[bool, bool, bool]) -> Loss:
    """Summed loss, the gradients of that sum that are needed, and metrics."""
    call, shards = shard
    x, head, target = call.input, call.head(), columns(call.target)
    valid = check_targets(target, call.ignore_index, shards.classes)
    nll = smooth = None  # (N, K) and (N,): 0 at ignored ones
    if valid.shape[1] != 1 or scales.nll is not None:
        nll = only(valid if scales.nll is None else columns(scales.nll), valid, head.acc)
    if scales.smooth is not None:
        smooth = only(scales.smooth, valid.any(1), head.acc)
    rows = _rows(shard, valid, nll, smooth, keep=metrics or scales.lse_sq is not None)
    sums = None if smooth is None else shard_sums(head, scales.class_weight, shards)
    softmax = ShardSoftmax(head, shards, rows, call.chunk_size, sums, Wanted(argmax=metrics))
    grads = ShardGradients(x, head, rows, needs, sums, shards)
    loss, lse_sq = softmax.buffer.new_zeros(()), softmax.buffer.new_zeros(())
    logp = softmax.buffer.new_zeros(valid.shape if metrics else (0,))
    argmax = torch.full(x.shape[:1] if metrics else (0,), -1, device=x.device)
    for part in rows.chunks(call.chunk_size):
        x_c = take(x, part, head.acc)
        t = take(target, part, torch.int64).masked_fill(~take(valid, part, torch.bool), 0)
        u, place, values = softmax.measure(x_c, t)
        up = Upstream(nll=take_any(nll, part), smooth=take_any(smooth, part))
        loss += _losses(softmax, values, up)
        if scales.lse_sq is not None:
            chunk_sq = values.soft.lse.square().sum()
            lse_sq += chunk_sq
            loss += chunk_sq * scales.lse_sq
            up = Upstream(up.nll, up.smooth, values.soft.lse * (2 * scales.lse_sq))
        if values.soft.argmax is not None:
            logp[part], argmax[part] = values.soft.logp, values.soft.argmax
        if any(needs):
            add_chunk(grads, softmax, part, (x_c, u, place), values, up)
    if metrics:
        logp = only(logp, valid, head.acc).view(call.target.shape)
    return Loss(loss, *grads.result(), lse_sq, logp, argmax)


def _rows(
    shard: ShardCall, valid: Tensor, nll: Tensor | None, smooth: Tensor | None, keep: bool
) -> Rows:
    """Rows with a valid target and, unless ``keep``, some factor not 0 on some rank."""
    taken = valid.any(1)
    if keep or nll is None:
        return select_rows(taken)
    live = (nll != 0).any(1)
    live = live if smooth is None else live | (smooth != 0)
    return select_rows(shard.shards.any_rank(live) & taken)


def _losses(softmax: ShardSoftmax, values: ChunkValues, up: Upstream) -> Tensor:
    """Sum of a chunk's losses but the z term."""
    total = _weighted(-values.soft.logp, up.nll)
    if softmax.sums is None or values.class_sum is None:
        return total
    return total + _weighted(softmax.sums.weighted_nll(values.soft, values.class_sum), up.smooth)


def _weighted(values: Tensor, factor: Tensor | None) -> Tensor:
    """Sum of ``values`` times ``factor``; a factor of 0 leaves nothing of an infinite value."""
    if factor is None:
        return values.sum()
    return torch.where(factor == 0, 0, values * factor).sum()
