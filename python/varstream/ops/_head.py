"""What the two head operators share: checks, the refusal of second derivatives."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from varstream._checks import (
    FLOATING,
    INTEGERS,
    acc_dtype,
    check_bool,
    check_float,
    check_int,
    check_positive,
    check_same_dtype,
    check_tensor,
    op_errors,
    values_visible,
)
from varstream.ops._autocast import cast_for_autocast
from varstream.reference.head import Chunking, Head
from varstream.reference.head_rows import check_targets

REDUCTIONS = ("mean", "sum", "none")
MOST_TARGETS = 1024  # of a row, in the CUDA kernels
AUTO_CHUNK = 0  # the op's word for "choose the chunk size"


class HeadCall(NamedTuple):
    """The operators' arguments up to ``chunk_size``, in schema order, checked."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    ignore_index: int
    logit_scale: float
    softcap: float
    temperature: float
    chunk_size: int
    max_rows: int | None = None
    logits_dtype: torch.dtype | None = None

    def chunking(self) -> Chunking:
        """How the kernels walk the rows."""
        return Chunking(self.chunk_size, self.max_rows, self.logits_dtype)

    def head(self) -> Head:
        """The projection as the reference kernels take it."""
        return Head(
            self.linear_weight, self.linear_bias, self.logit_scale, self.softcap, self.temperature
        )


def check_head(
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any,
    ignore_index: Any,
    logit_scale: Any,
    softcap: Any,
    temperature: Any,
    chunk_size: Any,
    max_rows: Any = None,
    logits_dtype: Any = None,
    validate: Any = False,
) -> HeadCall:
    """Check what both operators take; autocast applies as to a linear layer."""
    check_tensor("input", input, ndim=2, dtypes=FLOATING, layout="(N, d)")
    rows, width = input.shape
    device = input.device
    check_tensor("linear_weight", linear_weight, ndim=2, device=device, layout="(V, d)")
    check_tensor("linear_weight", linear_weight, shape=(None, width), layout="(V, d)")
    classes = linear_weight.shape[0]
    if classes < 1:
        raise ValueError(f"linear_weight must have at least one class (V, d), got {classes}")
    if linear_bias is not None:
        check_tensor("linear_bias", linear_bias, shape=(classes,), device=device, layout="(V,)")
    input, linear_weight, linear_bias = cast_for_autocast(input, linear_weight, linear_bias)
    check_same_dtype(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    _check_target(target, rows, device)
    ignore_index = _check_ignore_index(ignore_index, target.dtype)
    logit_scale = check_float("logit_scale", logit_scale)
    softcap = check_float("softcap", softcap, low=0.0)
    temperature = check_positive("temperature", temperature)
    check_factors(acc_dtype(input.dtype), logit_scale, softcap, temperature)
    check_bool("validate", validate)
    if validate and values_visible(target, validate=True):
        check_targets(target, ignore_index, classes)
    return HeadCall(
        input,
        linear_weight,
        linear_bias,
        target,
        ignore_index,
        logit_scale,
        softcap,
        temperature,
        AUTO_CHUNK if chunk_size is None else check_int("chunk_size", chunk_size, low=1),
        None if max_rows is None else check_int("max_rows", max_rows, low=0),
        _check_logits_dtype(logits_dtype, input.dtype),
    )


def check_weight_grad(value: Any, weight: Tensor) -> None:
    """A buffer that the weight's gradient is added to: (V, d), accumulation or weight dtype."""
    dtypes = (acc_dtype(weight.dtype), weight.dtype)
    check_tensor("weight_grad", value, shape=weight.shape, dtypes=dtypes, device=weight.device)
    if not value.is_contiguous():
        raise ValueError(f"weight_grad must be contiguous (V, d), got strides {value.stride()}")
    if value.requires_grad:
        raise ValueError("weight_grad must not require gradients, got requires_grad=True")


def check_factors(acc: torch.dtype, logit_scale: float, softcap: float, temperature: float) -> None:
    """Refuse factors of the logits that the accumulation dtype can't hold."""
    limits = torch.finfo(acc)
    for factor in (
        logit_scale / (softcap if softcap > 0 else temperature),
        logit_scale / temperature,
        softcap / temperature,
    ):
        if factor != 0 and not limits.tiny <= abs(factor) <= limits.max:
            raise ValueError(
                f"logit_scale, softcap and temperature must combine to factors that {acc} holds, "
                f"got {logit_scale}, {softcap} and {temperature}"
            )


def _check_logits_dtype(value: Any, dtype: torch.dtype) -> torch.dtype | None:
    """The accumulation dtype, which is also the default, or the inputs' own."""
    if value not in (None, acc_dtype(dtype), dtype):
        raise ValueError(
            f"logits_dtype must be None, {acc_dtype(dtype)} or the dtype of input ({dtype}), "
            f"got {value!r}"
        )
    return None if value == acc_dtype(dtype) else value


def _check_target(target: Any, rows: int, device: torch.device) -> None:
    """Class indices (N,) or (N, K)."""
    layout = "(N,) or (N, K)"
    if isinstance(target, Tensor) and target.is_floating_point():
        raise ValueError(
            f"target must hold class indices {layout}, int64 or int32: class probabilities are "
            f"not supported, got {str(target.dtype).removeprefix('torch.')}"
        )
    check_tensor("target", target, dtypes=INTEGERS, device=device)
    if device.type == "cuda" and target.dim() == 2 and target.shape[1] > MOST_TARGETS:
        raise ValueError(
            f"target must have at most {MOST_TARGETS} columns on CUDA, got {target.shape[1]}"
        )
    shape = tuple(target.shape)
    if target.dim() not in (1, 2):
        raise ValueError(f"target must have 1 or 2 dimensions {layout}, got shape {shape}")
    if target.shape[0] != rows:
        raise ValueError(f"target must have size {rows} in dimension 0 {layout}, got shape {shape}")


def _check_ignore_index(value: Any, dtype: torch.dtype) -> int:
    """An int that ``dtype`` can hold: a larger one would wrap around to some class."""
    value = check_int("ignore_index", value)
    limits = torch.iinfo(dtype)
    if not limits.min <= value <= limits.max:
        raise ValueError(f"ignore_index must fit the dtype of target ({dtype}), got {value}")
    return value


def check_reduction(reduction: Any, normalizer: Any = None) -> None:
    """A reduction by name; only a mean has a divisor to replace."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"normalizer needs reduction='mean', got reduction={reduction!r}")


def check_constant(name: str, value: Any, call: HeadCall, shape: Any, layout: str) -> Tensor | None:
    """Check an optional floating tensor that no gradient goes to."""
    if value is None:
        return None
    device = call.input.device
    check_tensor(name, value, shape=shape, dtypes=FLOATING, device=device, layout=layout)
    if value.requires_grad:
        raise ValueError(
            f"{name} must not require gradients: none are computed for it; detach it, "
            "got requires_grad=True"
        )
    return value


def direct_call(name: str, *args: Any, **constants: tuple[Tensor | None, Any]) -> HeadCall:
    """The op's own checks: what the public call has checked already, a direct call has not.

    ``args`` are HeadCall's; ``constants`` are further tensors with the shapes they must have.
    """
    call = HeadCall(*args)
    given: dict[str, Any] = call._asdict()
    chunk = given.pop("chunk_size")
    with op_errors(name):
        check_head(**given, chunk_size=None if chunk == AUTO_CHUNK else chunk)
        for key, (value, shape) in constants.items():
            if value is not None:
                check_tensor(key, value, shape=shape, dtypes=FLOATING, device=call.input.device)
    return call


def refuse_second_derivative(name: str) -> NoReturn:
    """Raise the error of a double backward."""
    raise RuntimeError(
        f"{name} has no second derivative; detach its gradients before differentiating them"
    )


class OnceOnly(torch.autograd.Function):
    """Identity on a finished gradient, inserted under ``create_graph=True``; its backward refuses.

    Without it such a gradient would look constant, and its second derivative would silently be 0.
    ``anchor`` is an output of the operator: it leads back to what one would differentiate by.
    """

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, anchor: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_second_derivative(ctx.name)


def scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """A finished gradient times the upstream scalar in ``dtype``, read and written once; in place
    where that may be."""
    with torch.no_grad():
        if grad.dtype != dtype:
            return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))
        return grad.mul_(upstream) if may_overwrite(grad) else grad * upstream


def may_overwrite(saved: Tensor) -> bool:
    """Whether a running backward may hand out a tensor it saved: nothing is traced or retained."""
    retained = torch._C._autograd._get_current_graph_task_keep_graph()
    return type(saved) is Tensor and not torch.compiler.is_compiling() and not retained
