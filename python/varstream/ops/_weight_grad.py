"""Row values whose backward adds the weight's gradient to a buffer of the caller's.

No ``(V, d)`` tensor exists beside it, and autograd hands nothing to the weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from varstream._checks import is_compiling
from varstream.ops._head import HeadCall, OnceOnly, check_weight_grad
from varstream.ops._token_logprobs import NAME, row_values
from varstream.reference.cross_entropy import Scales
from varstream.reference.token_logprobs import RowGradients, RowValues, Wanted

# Leads the backward here where neither input nor bias is trained; made once, for a compiled graph
# can't make a leaf. It never gets a gradient.
_LEAD = torch.zeros((), device="cpu", requires_grad=True)


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
    _check_disjoint(weight_grad, kept)
    return RowValues(*_Accumulating.apply(*operands, _LEAD, kept, class_weight, want, weight_grad))


def _check_disjoint(weight_grad: Tensor, call: HeadCall) -> None:
    """Refuse a buffer over an operand, which is read after the first chunk is added."""
    operands = {
        "input": call.input,
        "linear_weight": call.linear_weight,
        "linear_bias": call.linear_bias,
    }
    begin, end = _addresses(weight_grad)
    for name, other in operands.items():
        first, last = _addresses(other)
        if max(begin, first) < min(end, last):
            raise ValueError(f"weight_grad must not share memory with {name}, but it does")


def _addresses(t: Tensor | None) -> tuple[int, int]:
    """First and one-past-last byte address; an empty range where there is none to look at."""
    if t is None or is_compiling() or t.is_meta or type(t) is not Tensor or t.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


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
        lead: Tensor,
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
        operands = call.input, call.linear_weight, call.linear_bias, call.target
        ctx.save_for_backward(*operands, class_weight, entropy, values.logp)
        ctx.scalars, ctx.want, ctx.weight_grad = call[4:], want, weight_grad
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, class_weight, entropy, output = ctx.saved_tensors
        logp, entropy_grad, lse, class_sum = upstream[:4]
        wanted = RowGradients(  # a compiled graph has zeros for results that are empty
            logp,
            entropy_grad if ctx.want.entropy else None,
            lse,
            class_sum if ctx.want.class_sum else None,
        )
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
            _once(grad.to(x.dtype), output) if need else None
            for need, grad in zip(needs, (dx, dbias), strict=True)
        )
        return *given, None, None, None, None, None


def _once(grad: Tensor, output: Tensor) -> Tensor:
    """Under ``create_graph=True`` a gradient whose own derivative is refused: ``output`` leads back
    to what one would differentiate by."""
    return OnceOnly.apply(NAME, grad, output) if torch.is_grad_enabled() else grad
