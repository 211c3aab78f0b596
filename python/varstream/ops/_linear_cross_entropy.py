"""The op ``varstream::linear_cross_entropy``: its kernel, fake and autograd formula.

The op returns the summed loss together with the gradients of that sum, so its backward only
multiplies them by the upstream scalar, which carries the normaliser and any loss scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varstream import _load
from varstream._checks import acc_dtype
from varstream.cross_entropy import loss
from varstream.ops._head import HeadCall, OnceOnly, direct_call, scaled
from varstream.ops._token_logprobs import HEAD_ARGS, gradient_fakes
from varstream.reference import cross_entropy as reference
from varstream.reference.cross_entropy import Loss, Scales

NAME = "linear_cross_entropy"
_SCALES = slice(HEAD_ARGS, HEAD_ARGS + len(Scales._fields))


def loss_sum(call: HeadCall, scales: Scales, metrics: bool) -> Loss:
    """The op on checked arguments; forms the gradients autograd will ask for."""
    recording = torch.is_grad_enabled()
    operands = call.input, call.linear_weight, call.linear_bias
    needs = (t is not None and recording and t.requires_grad for t in operands)
    return Loss(*torch.ops.varstream.linear_cross_entropy(*call, *scales, metrics, *needs))


def _run(kernel: Callable[..., Loss], *args: Any) -> Loss:
    scales = Scales(*args[_SCALES])
    metrics, *needs = args[_SCALES.stop :]
    x, weight, _, target, *_ = args
    call = direct_call(
        NAME,
        *args[:HEAD_ARGS],
        class_weight=(scales.class_weight, weight.shape[:1]),
        nll_scale=(scales.nll, target.shape),
        smooth_scale=(scales.smooth, x.shape[:1]),
        lse_sq_scale=(scales.lse_sq, ()),
    )
    head = call.head()
    wanted = tuple(needs)
    return kernel(x, head, target, call.ignore_index, call.chunking(), scales, metrics, wanted)


def driver(*args: Any) -> Loss:
    """The op over the row kernels, which take everything but float64."""
    wide = args[0].dtype == torch.float64
    return _run(reference.linear_cross_entropy if wide else loss.linear_cross_entropy, *args)


@_load.composed_kernel(NAME, driver, on="softmax_rows_")
def composed(*args: Any) -> Loss:
    """The op composed from ATen calls."""
    return _run(reference.linear_cross_entropy, *args)


@_load.fake_kernel(NAME)
def _fake(*args: Any) -> tuple[Tensor, ...]:
    x, weight, _, target, *_ = args
    metrics, *needs = args[_SCALES.stop :]
    acc, none = acc_dtype(x.dtype), (0,)
    return Loss(
        x.new_empty((), dtype=acc),
        *gradient_fakes(x, weight, *needs),
        x.new_empty((), dtype=acc),
        x.new_empty(target.shape if metrics else none, dtype=acc),
        x.new_empty(x.shape[:1] if metrics else none, dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    found = Loss(*output)
    grads = found.input, found.weight, found.bias
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(found.loss_sum, *grads)
    ctx.dtype, ctx.needs = inputs[0].dtype, inputs[-3:]
    ctx.arguments = len(inputs)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    total, *grads = ctx.saved_tensors
    wanted = (
        _scaled(grad, upstream, ctx.dtype, total) if need and upstream is not None else None
        for need, grad in zip(ctx.needs, grads, strict=True)
    )
    return *wanted, *([None] * (ctx.arguments - 3))


def _scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype, total: Tensor) -> Tensor:
    """A finished gradient times the upstream scalar, in place when nobody can ask for it again."""
    grad = scaled(grad, upstream, dtype)
    # Under create_graph=True; total leads back to the op's inputs without keeping them alive.
    return OnceOnly.apply(NAME, grad, total) if torch.is_grad_enabled() else grad


_load.autograd(NAME, _setup_context)(_backward)
