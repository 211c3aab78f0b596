"""Row values whose backward adds the weight's gradient to a buffer of the caller's.

No ``(V, d)`` tensor exists beside it, and autograd hands nothing to the weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from varstream.ops._head import HeadCall, OnceOnly, check_weight_grad
from varstream.ops._token_logprobs import NAME, row_values
from varstream.reference.cross_entropy import Scales
from varstream.reference.token_logprobs import RowGradients, RowValues, Wanted


class Summed(NamedTuple):
    """A summed loss and what metrics need, as ``reference.cross_entropy.Loss`` names it."""

    loss_sum: Tensor  # () acc dtype
    lse_sq_sum: Tensor  # ()
    logp: Tensor  # like target
    argmax: Tensor  # (N,) int64, empty without metrics


def accumulating_values(
    weight_grad: Tensor, call: HeadCall, class_weight: Tensor | None, want: Wanted
) -> RowValues:
    """``row_values`` whose backward adds to ``weight_grad`` (V, d); the weight gets no gradient."""
    check_weight_grad(weight_grad, call.linear_weight)
    weight = call.linear_weight.detach()
    operands = call.input, call.linear_bias
    kept = call._replace(
        input=call.input.detach(),
        linear_weight=weight,
        linear_bias=None if call.linear_bias is None else call.linear_bias.detach(),
    )
    # Something must lead the backward here where neither input nor bias is trained.
    anchor = weight_grad.new_zeros(()).requires_grad_(torch.is_grad_enabled())
    return RowValues(*_Accumulating.apply(*operands, anchor, kept, class_weight, want, weight_grad))


def accumulating_sum(weight_grad: Tensor, call: HeadCall, scales: Scales, metrics: bool) -> Summed:
    """The summed loss from row values: its gradient is formed in the backward."""
    valid = call.target != call.ignore_index
    want = Wanted(class_sum=scales.smooth is not None, argmax=metrics)
    values = accumulating_values(weight_grad, call, scales.class_weight, want)
    nll = valid.to(values.logp.dtype) if scales.nll is None else scales.nll
    loss = _weighted(-values.logp, nll)
    if scales.smooth is not None:
        loss = loss + _weighted(-values.class_sum, scales.smooth)
    lse_sq = values.lse.square().sum()
    if scales.lse_sq is not None:
        loss = loss + lse_sq * scales.lse_sq
    return Summed(loss, lse_sq.detach(), values.logp.detach(), values.argmax)


def _weighted(values: Tensor, factor: Tensor) -> Tensor:
    return torch.where(factor == 0, 0, values * factor).sum()


class _Accumulating(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        call: HeadCall,
        class_weight: Tensor | None,
        want: Wanted,
        weight_grad: Tensor,
    ) -> tuple[Tensor, ...]:
        values = row_values(call, class_weight, want)
        fixed = [values.log_sum_sq, values.argmax]
        fixed += [] if want.entropy else [values.entropy]
        fixed += [] if want.class_sum else [values.class_sum]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*fixed)
        entropy = values.entropy if want.entropy else None
        ctx.save_for_backward(
            call.input, call.linear_weight, call.linear_bias, call.target, class_weight, entropy
        )
        ctx.scalars, ctx.weight_grad = call[4:], weight_grad
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, class_weight, entropy = ctx.saved_tensors
        wanted = RowGradients(*upstream[:4])
        if all(part is None for part in wanted):
            return (None,) * 7
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        with torch.no_grad():
            dx, dbias = torch.ops.varstream.token_logprobs_bwd_accumulate(
                *wanted,
                None if wanted.entropy is None else entropy,
                x,
                weight,
                bias,
                target,
                *ctx.scalars,
                class_weight,
                *needs,
                ctx.weight_grad,
            )
        given = (
            _once(grad.to(x.dtype), upstream) if need else None
            for need, grad in zip(needs, (dx, dbias), strict=True)
        )
        return *given, None, None, None, None, None


def _once(grad: Tensor, upstream: tuple[Tensor | None, ...]) -> Tensor:
    """Under ``create_graph=True`` a gradient whose own derivative is refused."""
    if not torch.is_grad_enabled():
        return grad
    anchor = next(part for part in upstream if part is not None)
    return OnceOnly.apply(NAME, grad, anchor)
