"""The summed loss of a sharded head: its autograd formula, and its loop over chunks where that is
composed from ATen calls.

The gradient of the sum is formed together with the loss, as on one rank: three products a chunk and
no second walk over the rows. All collectives are in the forward; the backward multiplies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from varstream.ops._head import scaled
from varstream.parallel import _kernel_walks, _kernels
from varstream.parallel._checks import ShardCall
from varstream.parallel._gradients import ShardGradients, add_chunk, finished
from varstream.parallel._kernel_walks import RowChoice
from varstream.parallel._softmax import ChunkValues, ShardSoftmax, shard_sums
from varstream.reference.cross_entropy import Loss, Scales, live_rows
from varstream.reference.head_gradient import Upstream
from varstream.reference.head_rows import (
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
            scaled(grad, upstream, ctx.dtype) if need else None
            for need, grad in zip(ctx.needs, grads, strict=True)
        ]
        return *finished("parallel.linear_cross_entropy", wanted, total), None, None, None, None


# --- the loop -------------------------------------------------------------------------------------


def _walk(shard: ShardCall, scales: Scales, metrics: bool, needs: tuple[bool, bool, bool]) -> Loss:
    """Summed loss, the gradients of that sum that are needed, and metrics."""
    call, shards = shard
    acc = call.head().acc
    valid = check_targets(columns(call.target), call.ignore_index, shards.classes)
    if valid.shape[1] != 1 or scales.nll is not None:
        nll = only(valid if scales.nll is None else columns(scales.nll), valid, acc)
        scales = scales._replace(nll=nll)
    if scales.smooth is not None:
        scales = scales._replace(smooth=only(scales.smooth, valid.any(1), acc))
    chosen = RowChoice(valid, _live(shard, valid, scales, metrics or scales.lse_sq is not None))
    run = _kernel_walks.loss if _kernels.chosen(call.input) else _composed
    return run(shard, scales, chosen, metrics, needs)


def _live(shard: ShardCall, valid: Tensor, scales: Scales, keep: bool) -> Tensor:
    """Rows (N,) with a valid target and, unless ``keep``, some factor not 0 on some rank."""
    taken, nll, smooth = valid.any(1), scales.nll, scales.smooth
    if keep or nll is None:
        return taken
    return shard.shards.any_rank(live_rows(valid, nll, smooth, keep)) & taken


def _composed(
    shard: ShardCall,
    scales: Scales,
    chosen: RowChoice,
    metrics: bool,
    needs: tuple[bool, bool, bool],
) -> Loss:
    """The walk composed from ATen calls; ``scales`` are (N, K) and (N,), 0 at ignored targets."""
    call, shards = shard
    x, head, target, valid = call.input, call.head(), columns(call.target), chosen.valid
    nll, smooth = scales.nll, scales.smooth
    rows = select_rows(chosen.live)
    call.chunking().check_composed(head, rows.count)
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
