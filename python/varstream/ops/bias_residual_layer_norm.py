"""``bias_residual_layer_norm``: the end of an encoder layer's two halves, in one operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from varstream import _load
from varstream._checks import (
    FLOATING,
    acc_dtype,
    check_float,
    check_same_dtype,
    check_tensor,
    op_errors,
)
from varstream.ops._autocast import float_for_autocast
from varstream.ops._head import refuse_second_derivative
from varstream.reference import encoder as reference

NAME = "bias_residual_layer_norm"


class Call(NamedTuple):
    """The operator's arguments in schema order, checked."""

    x: Tensor
    bias: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    ln_bias: Tensor | None
    eps: float


def bias_residual_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``LayerNorm(x + bias + residual)`` over the last dimension.

    The sum and the statistics are in acc dtype (float64 for float64 inputs, else float32) and the
    sum is never stored: the backward forms it again from the inputs.

    Args:
        x: ``(..., d)`` float64, float32, bfloat16 or float16; any strides, any number of rows, such
            as ``(total, d)``. The output of a linear layer without its bias.
        bias: ``(d,)`` that bias, or ``None``.
        residual: x's shape, or ``None``.
        weight: ``(d,)`` scale of the norm, or ``None`` for ones.
        ln_bias: ``(d,)`` shift of the norm, or ``None`` for zeros.
        eps: added to the variance, at least 0.

    Returns:
        x's shape and dtype (contiguous). Under autocast bfloat16 and float16 are cast to float32,
        and so is the result: autocast's rule for layer norm on CUDA, here on every device. It can
        be differentiated once.

    Raises:
        TypeError, ValueError: an argument breaks its contract (all tensors must have x's dtype and
            device); the message names it.

    Source: layer normalisation (Ba et al., 2016); the fusion is ByteTransformer's (2210.03052).
    """
    x, bias, residual, weight, ln_bias = float_for_autocast(x, bias, residual, weight, ln_bias)
    call = _check(x, bias, residual, weight, ln_bias, eps)
    y: Tensor = torch.ops.varstream.bias_residual_layer_norm(*call)[0]
    return y


def _check(x: Any, bias: Any, residual: Any, weight: Any, ln_bias: Any, eps: Any) -> Call:
    check_tensor("x", x, dtypes=FLOATING)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have at least 1 column (..., d), got shape {tuple(x.shape)}")
    for name, tensor in (("bias", bias), ("weight", weight), ("ln_bias", ln_bias)):
        if tensor is not None:
            check_tensor(name, tensor, shape=x.shape[-1:], device=x.device, layout="(d,)")
    if residual is not None:
        check_tensor("residual", residual, shape=x.shape, device=x.device, layout="of x")
    check_same_dtype(x=x, bias=bias, residual=residual, weight=weight, ln_bias=ln_bias)
    return Call(x, bias, residual, weight, ln_bias, check_float("eps", eps, low=0.0))


# --- kernels, fakes, autograd ---------------------------------------------------------------------


def _rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


@_load.composed_kernel(NAME)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    with op_errors(NAME):
        call = _check(*args)
    x = call.x.reshape(-1, call.x.shape[-1])
    y, mean, rstd = reference.layer_norm_forward(
        x, call.bias, _rows(call.residual), call.weight, call.ln_bias, call.eps
    )
    rows = call.x.shape[:-1]
    return y.view(call.x.shape), mean.view(rows), rstd.view(rows)


@_load.fake_kernel(NAME)
def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty(x.shape[:-1], dtype=acc_dtype(x.dtype))
    return x.new_empty(x.shape), stats, torch.empty_like(stats)


@_load.composed_kernel(f"{NAME}_bwd")
def _backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *need: bool,
) -> tuple[Tensor, ...]:
    with op_errors(f"{NAME}_bwd"):
        call = _check(x, bias, residual, weight, None, 0.0)
        acc = acc_dtype(x.dtype)
        wanted = {"dy": (dy, x.shape, x.dtype)}
        wanted |= {"mean": (mean, x.shape[:-1], acc), "rstd": (rstd, x.shape[:-1], acc)}
        for name, (tensor, shape, dtype) in wanted.items():
            check_tensor(name, tensor, shape=shape, dtypes=(dtype,), device=x.device)
    rows = call.x.reshape(-1, x.shape[-1])
    dy_rows = dy.reshape(rows.shape)
    dx, *rest = reference.layer_norm_backward(
        dy_rows, rows, bias, _rows(residual), weight, mean.flatten(), rstd.flatten(), need
    )
    return dx.view(x.shape) if need[0] else dx, *rest


@_load.fake_kernel(f"{NAME}_bwd")
def _backward_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    need_x, *need = rest[-4:]
    dx = x.new_empty(x.shape if need_x else (0,))
    return dx, *(x.new_empty(x.shape[-1:] if needed else (0,)) for needed in need)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, bias, residual, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, bias, residual, weight, mean, rstd)


def _autograd(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    need_x, need_bias, need_residual, need_weight, need_shift, _ = ctx.needs_input_grad
    if dy is None:
        return (None,) * 6
    need = need_x or need_residual, need_bias, need_weight, need_shift
    dx, dbias, dweight, dshift = torch.ops.varstream.bias_residual_layer_norm_bwd(
        dy, *ctx.saved_tensors, *need
    )
    return (
        dx if need_x else None,
        dbias if need_bias else None,
        dx if need_residual else None,
        dweight if need_weight else None,
        dshift if need_shift else None,
        None,
    )


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    refuse_second_derivative(NAME)


_load.autograd(NAME, _setup_context)(_autograd)
_load.autograd(f"{NAME}_bwd")(_no_double_backward)
