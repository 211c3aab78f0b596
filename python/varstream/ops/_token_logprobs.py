"""The op ``varstream::token_logprobs``: its kernels, fakes and autograd formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varstream import _load
from varstream._checks import acc_dtype
from varstream.ops._head import HeadCall, direct_call, refuse_second_derivative
from varstream.reference import token_logprobs as reference
from varstream.reference.token_logprobs import RowGradients, RowValues, Wanted

NAME = "token_logprobs"
HEAD_ARGS = len(HeadCall._fields)


def row_values(call: HeadCall, class_weight: Tensor | None, want: Wanted) -> RowValues:
    """The op on checked arguments; what isn't wanted is empty."""
    return RowValues(*torch.ops.varstream.token_logprobs(*call, class_weight, *want))


# --- kernels and fakes ----------------------------------------------------------------------------


@_load.composed_kernel(NAME)
def _kernel(*args: Any) -> tuple[Tensor, ...]:
    class_weight, *want = args[HEAD_ARGS:]
    shape = args[1].shape[:1]
    call = direct_call(NAME, *args[:HEAD_ARGS], class_weight=(class_weight, shape))
    return reference.token_logprobs(
        call.input,
        call.head(),
        call.target,
        call.ignore_index,
        call.chunk_size,
        class_weight,
        Wanted(*want),
    )


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


@_load.composed_kernel(f"{NAME}_bwd")
def _bwd_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    upstream, entropy = RowGradients(*args[:4]), args[4]
    head_args, (class_weight, *needs) = args[5 : 5 + HEAD_ARGS], args[5 + HEAD_ARGS :]
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
    return reference.token_logprobs_bwd(
        upstream,
        x,
        call.head(),
        target,
        entropy,
        call.ignore_index,
        call.chunk_size,
        class_weight,
        tuple(needs),
    )


@_load.fake_kernel(f"{NAME}_bwd")
def _bwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = args[5:7]
    return gradient_fakes(x, weight, *args[-3:])


def gradient_fakes(
    x: Tensor, weight: Tensor, need_input: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
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
