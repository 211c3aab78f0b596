"""The op ``varstream::token_logprobs``: its kernels, fakes and autograd formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varstream import _load
from varstream._checks import acc_dtype, op_errors
from varstream.cross_entropy import logprobs
from varstream.ops._head import HeadCall, check_weight_grad, direct_call, refuse_second_derivative
from varstream.reference import token_logprobs as reference
from varstream.reference.token_logprobs import RowGradients, RowValues, Wanted

NAME = "token_logprobs"
HEAD_ARGS = len(HeadCall._fields)

Needs = tuple[bool, bool, bool]


def row_values(call: HeadCall, class_weight: Tensor | None, want: Wanted) -> RowValues:
    """The op on checked arguments; what isn't wanted is empty."""
    return RowValues(*torch.ops.varstream.token_logprobs(*call, class_weight, *want))


# --- kernels and fakes ----------------------------------------------------------------------------


def _run(kernel: Callable[..., RowValues], *args: Any) -> RowValues:
    class_weight, *want = args[HEAD_ARGS:]
    shape = args[1].shape[:1]
    call = direct_call(NAME, *args[:HEAD_ARGS], class_weight=(class_weight, shape))
    return kernel(
        call.input,
        call.head(),
        call.target,
        call.ignore_index,
        call.chunking(),
        class_weight,
        Wanted(*want),
    )


def driver(*args: Any) -> RowValues:
    """The op over the row kernels, which take everything but float64."""
    wide = args[0].dtype == torch.float64
    return _run(reference.token_logprobs if wide else logprobs.token_logprobs, *args)


@_load.composed_kernel(NAME, driver, on="softmax_rows_")
def composed(*args: Any) -> RowValues:
    """The op composed from ATen calls."""
    return _run(reference.token_logprobs, *args)


@_load.fake_kernel(NAME)
def _fake(*args: Any) -> tuple[Tensor, ...]:
    x, target = args[0], args[3]
    want = Wanted(*args[HEAD_ARGS + 1 :])
    acc, rows = acc_dtype(x.dtype), x.shape[0]

    def per_row(wanted: bool, dtype: torch.dtype = acc) -> Tensor:
        return x.new_empty((rows if wanted else 0,), dtype=dtype)

    return RowValues(
        x.new_empty(target.shape, dtype=acc),
        per_row(want.entropy),
        per_row(True),
        per_row(want.class_sum),
        per_row(want.log_sum_sq),
        per_row(want.argmax, torch.int64),
    )


Three = tuple[Tensor, Tensor, Tensor]


def _run_bwd(
    kernel: Callable[..., Three], args: tuple[Any, ...], needs: Needs, weight_grad: Tensor | None
) -> Three:
    """``args``: those that the two backward operators share."""
    upstream, entropy = RowGradients(*args[:4]), args[4]
    head_args, class_weight = args[5 : 5 + HEAD_ARGS], args[5 + HEAD_ARGS]
    x, weight, _, target, *_ = head_args
    rows = x.shape[:1]
    call = direct_call(
        f"{NAME}_bwd",
        *head_args,
        dlogp=(upstream.logp, target.shape),
        dentropy=(upstream.entropy, rows),
        dlse=(upstream.lse, rows),
        dclass_sum=(upstream.class_sum, rows),
        entropy=(entropy, rows),
        class_weight=(class_weight, weight.shape[:1]),
    )
    if upstream.entropy is not None and entropy is None:
        raise RuntimeError(f"varstream::{NAME}_bwd: dentropy needs entropy, got None")
    return kernel(
        upstream,
        x,
        call.head(),
        target,
        entropy,
        call.ignore_index,
        call.chunking(),
        class_weight,
        needs,
        weight_grad,
    )


def _bwd_kernel_of(x: Tensor) -> Callable[..., Three]:
    wide = x.dtype == torch.float64
    return reference.token_logprobs_bwd if wide else logprobs.token_logprobs_bwd


def bwd_driver(*args: Any) -> Three:
    """``token_logprobs_bwd`` over the row kernels."""
    return _run_bwd(_bwd_kernel_of(args[5]), args[:-3], args[-3:], None)


@_load.composed_kernel(f"{NAME}_bwd", bwd_driver, on="softmax_rows_")
def bwd_composed(*args: Any) -> Three:
    """``token_logprobs_bwd`` composed from ATen calls."""
    return _run_bwd(reference.token_logprobs_bwd, args[:-3], args[-3:], None)


def _accumulate(kernel: Callable[..., Three], args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    *shared, need_input, need_bias, weight_grad = args
    with op_errors(f"{NAME}_bwd_accumulate"):
        check_weight_grad(weight_grad, shared[6])
    needs = need_input, True, need_bias
    dinput, _, dbias = _run_bwd(kernel, tuple(shared), needs, weight_grad)
    return dinput, dbias


def accumulate_driver(*args: Any) -> tuple[Tensor, Tensor]:
    """``token_logprobs_bwd_accumulate`` over the row kernels."""
    return _accumulate(_bwd_kernel_of(args[5]), args)


@_load.composed_kernel(f"{NAME}_bwd_accumulate", accumulate_driver, on="softmax_rows_")
def accumulate_composed(*args: Any) -> tuple[Tensor, Tensor]:
    """``token_logprobs_bwd_accumulate`` composed from ATen calls."""
    return _accumulate(reference.token_logprobs_bwd, args)


@_load.fake_kernel(f"{NAME}_bwd_accumulate")
def _accumulate_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, (need_input, need_bias, _) = args[5], args[6], args[-3:]
    dinput, _, dbias = gradient_fakes(x, weight, need_input, False, need_bias)
    return dinput, dbias


@_load.fake_kernel(f"{NAME}_bwd")
def _bwd_fake(*args: Any) -> Three:
    x, weight = args[5:7]
    return gradient_fakes(x, weight, *args[-3:])


def gradient_fakes(
    x: Tensor, weight: Tensor, need_input: bool, need_weight: bool, need_bias: bool
) -> Three:
    """Gradients as the kernels return them: of the input in its dtype, the others in acc dtype."""
    acc = acc_dtype(x.dtype)
    return (
        x.new_empty(x.shape if need_input else (0,)),
        x.new_empty(weight.shape if need_weight else (0,), dtype=acc),
        x.new_empty(weight.shape[:1] if need_bias else (0,), dtype=acc),
    )


# --- autograd -------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, class_weight = inputs[:4] + inputs[HEAD_ARGS : HEAD_ARGS + 1]
    values, want = RowValues(*output), Wanted(*inputs[HEAD_ARGS + 1 :])
    fixed = [values.log_sum_sq, values.argmax]
    fixed += [] if want.entropy else [values.entropy]
    fixed += [] if want.class_sum else [values.class_sum]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*fixed)
    ctx.save_for_backward(*operands, class_weight, values.entropy if want.entropy else None)
    ctx.scalars = inputs[4:HEAD_ARGS]


def _backward(
    ctx: Any,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    dlse: Tensor | None,
    dclass_sum: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    *operands, class_weight, entropy = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    upstream = RowGradients(dlogp, dentropy, dlse, dclass_sum)
    none = (None,) * (HEAD_ARGS + 1 + len(Wanted._fields))
    if all(part is None for part in upstream) or not any(needs):
        return none
    grads = torch.ops.varstream.token_logprobs_bwd(
        *upstream,
        None if dentropy is None else entropy,
        *operands,
        *ctx.scalars,
        class_weight,
        *needs,
    )
    dtype = operands[0].dtype
    wanted = (g.to(dtype) if need else None for need, g in zip(needs, grads, strict=True))
    return *wanted, *none[3:]


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    refuse_second_derivative(NAME)


_load.autograd(NAME, _setup_context)(_backward)
_load.autograd(f"{NAME}_bwd")(_no_second_derivative)
