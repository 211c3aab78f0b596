"""Values of each row of a sharded head, and their gradients from rebuilt logits.

As on one rank the forward keeps what is per row only. The backward forms the logits again, and
exchanges their statistics again: probabilities from the rebuilt logits alone sum to 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream.ops._head import HeadCall
from varstream.parallel import _kernel_walks, _kernels
from varstream.parallel._checks import ShardCall
from varstream.parallel._gradients import ShardGradients, add_chunk, finished
from varstream.parallel._kernel_walks import RowChoice
from varstream.parallel._softmax import ShardSoftmax, shard_sums
from varstream.reference.head_gradient import Upstream
from varstream.reference.head_rows import (
    check_targets,
    columns,
    only,
    select_rows,
    take,
    take_any,
)
from varstream.reference.token_logprobs import RowGradients, RowValues, Wanted, of_losses


def row_values(shard: ShardCall, class_weight: Tensor | None, want: Wanted) -> RowValues:
    """Values of checked arguments, ``class_weight`` (V,); what isn't wanted is empty."""
    call = shard.call
    operands = call.input, call.linear_weight, call.linear_bias
    return RowValues(*_RowValues.apply(*operands, shard, class_weight, want))


class _RowValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shard: ShardCall,
        class_weight: Tensor | None,
        want: Wanted,
    ) -> tuple[Tensor, ...]:
        values = _walk(shard, class_weight, want)
        fixed = [values.log_sum_sq, values.argmax]
        fixed += [] if want.entropy else [values.entropy]
        fixed += [] if want.class_sum else [values.class_sum]
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x,
            weight,
            bias,
            shard.call.target,
            class_weight,
            values.entropy if want.entropy else None,
            values.logp,
        )
        # The tensors stay with autograd, which notices when they are changed in place.
        ctx.shards, ctx.scalars = shard.shards, shard.call[4:]
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, class_weight, entropy, logp = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:3])
        wanted = RowGradients(*upstream[:4])  # logp, entropy, lse, class_sum
        if all(part is None for part in wanted):
            return (None,) * 6
        shard = ShardCall(HeadCall(x, weight, bias, target, *ctx.scalars), ctx.shards)
        with torch.no_grad():
            grads = _walk_back(shard, wanted, entropy, class_weight, needs)
            given = [g.to(x.dtype) if n else None for n, g in zip(needs, grads, strict=True)]
        return *finished("parallel.token_logprobs", given, logp), None, None, None


# --- the loops ------------------------------------------------------------------------------------


def _walk(shard: ShardCall, class_weight: Tensor | None, want: Wanted) -> RowValues:
    """Values of each row, 0 (argmax -1) at ignored ones."""
    call = shard.call
    valid = check_targets(columns(call.target), call.ignore_index, shard.shards.classes)
    run = _kernel_walks.values if _kernels.chosen(call.input) else _composed
    return run(shard, class_weight, want, RowChoice(valid, valid.any(1)))


def _composed(
    shard: ShardCall, class_weight: Tensor | None, want: Wanted, chosen: RowChoice
) -> RowValues:
    """The walk composed from ATen calls."""
    call, shards = shard
    x, head, target, valid = call.input, call.head(), columns(call.target), chosen.valid
    rows = select_rows(chosen.live)
    call.chunking().check_composed(head, rows.count)
    sums = shard_sums(head, class_weight, shards) if want.class_sum else None
    softmax = ShardSoftmax(head, shards, rows, call.chunk_size, sums, want)
    zeros = softmax.buffer.new_zeros
    logp, lse = zeros(valid.shape), zeros(rows.total)
    entropy, class_sum, log_sum_sq = (
        zeros(rows.total if wanted else 0)
        for wanted in (want.entropy, want.class_sum, want.log_sum_sq)
    )
    argmax = torch.full((rows.total if want.argmax else 0,), -1, device=x.device)
    for part in rows.chunks(call.chunk_size):
        t = take(target, part, torch.int64).masked_fill(~take(valid, part, torch.bool), 0)
        _, _, values = softmax.measure(take(x, part, head.acc), t)
        logp[part], lse[part] = values.soft.logp, values.soft.lse
        if sums is not None and values.class_sum is not None:
            class_sum[part] = -sums.weighted_nll(values.soft, values.class_sum)
        for out, found in (
            (entropy, values.entropy),
            (log_sum_sq, values.log_sum_sq),
            (argmax, values.soft.argmax),
        ):
            if found is not None:
                out[part] = found
    logp = only(logp, valid, head.acc).view(call.target.shape)
    return RowValues(logp, entropy, lse, class_sum, log_sum_sq, argmax)


def _walk_back(
    shard: ShardCall,
    upstream: RowGradients,
    entropy: Tensor | None,
    class_weight: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum of each upstream gradient times its value; rows whose upstream
    gradients are 0 on every rank are skipped like ignored ones."""
    call, shards = shard
    valid = columns(call.target) != call.ignore_index
    up, live = of_losses(upstream, valid, valid.any(1), entropy, call.head().acc)
    chosen = RowChoice(valid, shards.any_rank(live))
    run = _kernel_walks.gradients if _kernels.chosen(call.input) else _composed_back
    return run(shard, up, chosen, class_weight, needs)


def _composed_back(
    shard: ShardCall,
    up: Upstream,
    chosen: RowChoice,
    class_weight: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The second walk composed from ATen calls."""
    call, shards = shard
    x, head, target, valid = call.input, call.head(), columns(call.target), chosen.valid
    rows = select_rows(chosen.live)
    call.chunking().check_composed(head, rows.count)
    sums = None if up.smooth is None else shard_sums(head, class_weight, shards)
    softmax = ShardSoftmax(head, shards, rows, call.chunk_size, sums)
    grads = ShardGradients(x, head, rows, needs, sums, shards)
    for part in rows.chunks(call.chunk_size):
        x_c = take(x, part, head.acc)
        t = take(target, part, torch.int64).masked_fill(~take(valid, part, torch.bool), 0)
        u, place, values = softmax.measure(x_c, t)
        given = (up.nll, up.smooth, up.lse, up.entropy, up.entropy_value)
        up_c = Upstream(*(take_any(part_up, part) for part_up in given))
        add_chunk(grads, softmax, part, (x_c, u, place), values, up_c)
    return grads.result()
