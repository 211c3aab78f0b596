"""The operator under ``objectives.distillation``: its checks, kernel, fake and autograd formula.

One operator serves every reduction. With gradients asked for it forms those of the weighted sum in
the forward, and ``loss_sum`` is differentiable; without, ``losses`` is, and its backward calls the
operator again with the upstream gradient as weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varstream import _load
from varstream._checks import (
    FLOATING,
    acc_dtype,
    check_float,
    check_int,
    check_positive,
    check_same_dtype,
    check_tensor,
    op_errors,
)
from varstream.cross_entropy import distillation as kernels
from varstream.ops._autocast import cast_for_autocast
from varstream.ops._head import AUTO_CHUNK, OnceOnly, check_factors, scaled
from varstream.ops._token_logprobs import gradient_fakes
from varstream.reference import distillation as reference
from varstream.reference.head import Chunking, Head

NAME = "linear_distillation"
_ARGS = 16  # of DistillationCall


class DistillationCall(NamedTuple):
    """The operator's arguments up to ``chunk_size``, in schema order, checked."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    teacher_input: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    mask: Tensor | None
    token_weight: Tensor | None
    beta: float
    temperature: float
    logit_scale: float
    softcap: float
    teacher_logit_scale: float
    teacher_softcap: float
    chunk_size: int
    max_rows: int | None = None

    def student(self) -> Head:
        return Head(
            self.linear_weight, self.linear_bias, self.logit_scale, self.softcap, self.temperature
        )

    def teacher(self) -> Head:
        return Head(
            self.teacher_weight,
            self.teacher_bias,
            self.teacher_logit_scale,
            self.teacher_softcap,
            self.temperature,
        )


def check_distillation(call: DistillationCall) -> DistillationCall:
    """Check every argument but ``chunk_size`` 0, the automatic rule; autocast applies to both."""
    student = _check_projection("input linear_weight linear_bias", "(N, d)", "(V, d)", *call[:3])
    names = "teacher_input teacher_weight teacher_bias"
    teacher = _check_projection(names, "(N, e)", "(V, e)", *call[3:6])
    rows, classes, device = call.input.shape[0], call.linear_weight.shape[0], call.input.device
    check_tensor("teacher_input", teacher[0], shape=(rows, None), device=device, layout="(N, e)")
    check_tensor("teacher_weight", teacher[1], shape=(classes, None), layout="(V, e)")
    acc, got = acc_dtype(student[0].dtype), teacher[0].dtype
    if acc_dtype(got) != acc:
        raise ValueError(
            f"teacher_input must be accumulated in {acc} like input ({student[0].dtype}), got {got}"
        )
    for name, value, dtypes in (
        ("mask", call.mask, (torch.bool,)),
        ("token_weight", call.token_weight, FLOATING),
    ):
        if value is not None:
            check_tensor(name, value, shape=(rows,), dtypes=dtypes, device=device, layout="(N,)")
    checked = DistillationCall(
        *student,
        *teacher,
        call.mask,
        None if call.token_weight is None else call.token_weight.detach(),
        check_float("beta", call.beta, low=0.0, high=1.0),
        check_positive("temperature", call.temperature),
        check_float("logit_scale", call.logit_scale),
        check_float("softcap", call.softcap, low=0.0),
        check_float("teacher_logit_scale", call.teacher_logit_scale),
        check_float("teacher_softcap", call.teacher_softcap, low=0.0),
        check_int("chunk_size", call.chunk_size, low=AUTO_CHUNK),
        None if call.max_rows is None else check_int("max_rows", call.max_rows, low=0),
    )
    for head in (checked.student(), checked.teacher()):
        check_factors(acc, head.logit_scale, head.softcap, head.temperature)
    return checked


def _check_projection(
    names: str, rows: str, classes: str, input: Any, weight: Any, bias: Any
) -> tuple[Any, Any, Any]:
    """One side's rows, weight and bias, of one dtype after autocast; the names as the caller's."""
    input_name, weight_name, bias_name = names.split()
    check_tensor(input_name, input, ndim=2, dtypes=FLOATING, layout=rows)
    shape, device = (None, input.shape[1]), input.device
    check_tensor(weight_name, weight, shape=shape, device=device, layout=classes)
    if weight.shape[0] < 1:
        raise ValueError(f"{weight_name} must have at least one class {classes}, got 0")
    if bias is not None:
        check_tensor(bias_name, bias, shape=weight.shape[:1], device=device, layout="(V,)")
    input, weight, bias = cast_for_autocast(input, weight, bias)
    check_same_dtype(**{input_name: input, weight_name: weight, bias_name: bias})
    return input, weight, bias


def divergences(call: DistillationCall, summed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The op on checked arguments: losses (N,), their weighted sum () and the rows' number ().

    With ``summed`` the sum is differentiable, else the losses are. The teacher is a constant.
    """
    operands = call.input, call.linear_weight, call.linear_bias
    forming = summed and torch.is_grad_enabled()
    needs = (t is not None and forming and t.requires_grad for t in operands)
    teacher = (None if t is None else t.detach() for t in call[3:6])
    losses, loss_sum, count, *_ = torch.ops.varstream.linear_distillation(
        *call[:3], *teacher, *call[6:], *needs
    )
    return losses, loss_sum, count


# --- kernel and fake ------------------------------------------------------------------------------


def _run(kernel: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
    with op_errors(NAME):
        call = check_distillation(DistillationCall(*args[:_ARGS]))
    return kernel(
        call.input,
        call.student(),
        call.teacher_input,
        call.teacher(),
        call.mask,
        call.token_weight,
        call.beta,
        Chunking(call.chunk_size, call.max_rows),
        args[_ARGS:],
    )


def driver(*args: Any) -> tuple[Tensor, ...]:
    """The op over the row kernels, which take everything but float64."""
    wide = args[0].dtype == torch.float64
    return _run(reference.linear_distillation if wide else kernels.linear_distillation, *args)


@_load.composed_kernel(NAME, driver, on="distillation_rows_")
def composed(*args: Any) -> tuple[Tensor, ...]:
    """The op composed from ATen calls."""
    return _run(reference.linear_distillation, *args)


@_load.fake_kernel(NAME)
def _fake(*args: Any) -> tuple[Tensor, ...]:
    x, weight = args[:2]
    losses = x.new_empty(x.shape[:1], dtype=acc_dtype(x.dtype))
    count = x.new_empty((), dtype=torch.int64)
    return losses, losses.new_empty(()), count, *gradient_fakes(x, weight, *args[_ARGS:])


# --- autograd -------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    losses, loss_sum, _, *grads = output
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.scalars, ctx.formed = inputs[0].dtype, inputs[8:_ARGS], inputs[_ARGS:]
    if any(ctx.formed):
        ctx.mark_non_differentiable(losses, *grads)
        ctx.save_for_backward(loss_sum, *grads)
    else:
        ctx.mark_non_differentiable(loss_sum, *grads)
        ctx.save_for_backward(losses, *inputs[:7])


def _backward(
    ctx: Any, dlosses: Tensor | None, dsum: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if any(ctx.formed):
        return *_finished(ctx, dsum), *([None] * _ARGS)
    return *_recomputed(ctx, dlosses), *([None] * _ARGS)


def _finished(ctx: Any, dsum: Tensor | None) -> list[Tensor | None]:
    """The gradients of the sum times the upstream scalar, in place where nobody else can see."""
    loss_sum, *grads = ctx.saved_tensors
    results: list[Tensor | None] = []
    for formed, grad in zip(ctx.formed, grads, strict=True):
        if not formed or dsum is None:
            results.append(None)
            continue
        results.append(_once(scaled(grad, dsum, ctx.dtype), loss_sum))
    return results


def _recomputed(ctx: Any, dlosses: Tensor | None) -> list[Tensor | None]:
    """The gradients of ``sum(dlosses * losses)``; rows without an upstream gradient are skipped."""
    losses, *tensors, mask = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    if dlosses is None or not any(needs):
        return [None] * 3
    with torch.no_grad():
        live = dlosses != 0 if mask is None else mask & (dlosses != 0)
        *_, dinput, dweight, dbias = torch.ops.varstream.linear_distillation(
            *tensors, live, dlosses, *ctx.scalars, *needs
        )
    grads = zip(needs, (dinput, dweight, dbias), strict=True)
    return [_once(grad.to(ctx.dtype), losses) if need else None for need, grad in grads]


def _once(grad: Tensor, anchor: Tensor) -> Tensor:
    """Under ``create_graph=True`` a gradient whose own derivative is refused."""
    return OnceOnly.apply(NAME, grad, anchor) if torch.is_grad_enabled() else grad


_load.autograd(NAME, _setup_context)(_backward)
