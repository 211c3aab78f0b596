"""``linear_bias_gelu``: the first half of an encoder's feed-forward block, in one operator."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varstream import _load
from varstream._checks import FLOATING, check_same_dtype, check_tensor, op_errors
from varstream.ops._autocast import cast_for_autocast
from varstream.ops._head import refuse_second_derivative
from varstream.reference import encoder as reference

NAME = "linear_bias_gelu"
APPROXIMATIONS = ("none", "tanh")


class Call(NamedTuple):
    """The operator's arguments in schema order, checked."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    approximate: str


def linear_bias_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none"
) -> Tensor:
    """``gelu(x weight^T + bias)``.

    The pre-activation is kept for the backward, which forms GELU's derivative from it; without
    gradients the result takes its memory.

    Args:
        x: ``(..., d)`` float64, float32, bfloat16 or float16; any strides, any number of rows, such
            as ``(total, d)``.
        weight: ``(f, d)`` in x's dtype.
        bias: ``(f,)`` in x's dtype, or ``None``.
        approximate: ``"none"`` for ``x Phi(x)``, ``"tanh"`` for its tanh form (gelu_new).

    Returns:
        ``(..., f)`` in x's dtype; in the autocast dtype under autocast, as for torch's own linear
        layer. It can be differentiated once.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.

    Source: GELU (Hendrycks and Gimpel, 2016); the fusion is ByteTransformer's (2210.03052).
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    call = _check(x, weight, bias, approximate)
    given = (x, weight, bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y: Tensor = torch.ops.varstream.linear_bias_gelu(*call, keep)[0]
    return y


def _check(x: Any, weight: Any, bias: Any, approximate: Any) -> Call:
    check_tensor("x", x, dtypes=FLOATING)
    if x.dim() < 1:
        raise ValueError("x must have at least 1 dimension (..., d), got a scalar")
    check_tensor("weight", weight, ndim=2, device=x.device, layout="(f, d)")
    check_tensor("weight", weight, shape=(None, x.shape[-1]), layout="(f, d)")
    if bias is not None:
        check_tensor("bias", bias, shape=weight.shape[:1], device=x.device, layout="(f,)")
    check_same_dtype(x=x, weight=weight, bias=bias)
    if not isinstance(approximate, str):
        raise TypeError(f"approximate must be a str, got {type(approximate).__name__}")
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return Call(x, weight, bias, approximate)


# --- kernels, fakes, autograd ---------------------------------------------------------------------


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


@_load.composed_kernel(NAME)
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    with op_errors(NAME):
        _check(x, weight, bias, approximate)
    shape = *x.shape[:-1], weight.shape[0]
    y, pre = reference.linear_gelu_forward(_rows(x), weight, bias, approximate, keep_pre)
    return y.view(shape), pre.view(shape) if keep_pre else pre


@_load.fake_kernel(NAME)
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, torch.empty_like(y) if keep_pre else x.new_empty(0)


@_load.composed_kernel(f"{NAME}_bwd")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor, approximate: str, *need: bool
) -> tuple[Tensor, ...]:
    with op_errors(f"{NAME}_bwd"):
        _check(x, weight, None, approximate)
        shape = (*x.shape[:-1], weight.shape[0])
        for name, tensor in (("dy", dy), ("pre", pre)):
            check_tensor(name, tensor, shape=shape, dtypes=(x.dtype,), device=x.device)
    dx, *rest = reference.linear_gelu_backward(
        _rows(dy), _rows(x), weight, _rows(pre), approximate, need
    )
    return dx.view(x.shape) if need[0] else dx, *rest


@_load.fake_kernel(f"{NAME}_bwd")
def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor, approximate: str, *need: bool
) -> tuple[Tensor, ...]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(s if n else (0,)) for s, n in zip(shapes, need, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.approximate, ctx.kept = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1] if ctx.kept else bias)


def _autograd(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    x, weight, last = ctx.saved_tensors
    pre = last if ctx.kept else torch.nn.functional.linear(x, weight, last)
    need = ctx.needs_input_grad[:3]
    grads = torch.ops.varstream.linear_bias_gelu_bwd(dy, x, weight, pre, ctx.approximate, *need)
    return *(g if needed else None for g, needed in zip(grads, need, strict=True)), None, None


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    refuse_second_derivative(NAME)


_load.autograd(NAME, _setup_context)(_autograd)
_load.autograd(f"{NAME}_bwd")(_no_double_backward)
