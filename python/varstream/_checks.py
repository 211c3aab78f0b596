"""Argument checks shared by the public wrappers.

Every message names the argument, the contract and the value that broke it. Wrong kinds raise
``TypeError``, wrong shapes, dtypes, devices and values raise ``ValueError``, always before anything
is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
_SIZE = re.compile(r"[\d.]+\s*[kmgt]?i?b", re.IGNORECASE)  # bytes as people write them: "16GiB"


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype of the contract: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_compiling() -> bool:
    """True while torch.compile traces: values inside tensors can't be looked at."""
    return torch.compiler.is_compiling()


def values_visible(*tensors: Tensor | None, validate: bool = False) -> bool:
    """True when the tensors' values may be read: no device synchronisation, or one asked for."""
    return not is_compiling() and all(
        validate or t is None or (t.device.type == "cpu" and type(t) is Tensor) for t in tensors
    )


def check_tensor(
    name: str,
    value: Any,
    *,
    ndim: int | None = None,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    layout: str = "",
) -> Tensor:
    """Check one tensor argument and return it.

    Args:
        name: the argument's name in the public signature.
        value: what the caller passed.
        ndim: required number of dimensions, if any.
        shape: required sizes, ``None`` for a free dimension.
        dtypes: allowed dtypes.
        device: required device.
        layout: the contract's shape in words, such as ``"(total_q, Hq, D)"``, for the message.

    Raises:
        TypeError: ``value`` is no tensor, or one that ``check_no_transforms`` refuses.
        ValueError: it is sparse, or dimensions, sizes, dtype or device aren't what is required.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    check_no_transforms(name, value)
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense, strided tensor, got {value.layout}")
    words = f" {layout}" if layout else ""
    if shape is not None:
        ndim = len(shape)
    if ndim is not None and value.dim() != ndim:
        raise ValueError(
            f"{name} must have {ndim} dimensions{words}, got shape {tuple(value.shape)}"
        )
    if shape is not None:
        for axis, want in enumerate(shape):
            if want is not None and value.shape[axis] != want:
                raise ValueError(
                    f"{name} must have size {want} in dimension {axis}{words}, "
                    f"got shape {tuple(value.shape)}"
                )
    if dtypes is not None and value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must have dtype {allowed}, got {got}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")
    return value


def check_no_transforms(name: str, value: Tensor) -> None:
    """Refuse a tensor inside a ``torch.func`` transform and a forward-mode dual.

    The operators know reverse mode only; torch would drop a tangent, or the gradient of a batched
    tensor, without a word.

    Raises:
        TypeError: the tensor is batched, tracked or dual.
    """
    if is_compiling():
        return
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(value) or functorch.is_gradtrackingtensor(value):
        raise TypeError(
            f"{name} must be a plain tensor: torch.func transforms are not supported, "
            f"got one inside {'vmap' if functorch.is_batchedtensor(value) else 'grad or jvp'}"
        )
    if forward_ad.unpack_dual(value).tangent is not None:
        raise TypeError(
            f"{name} must be a plain tensor: forward-mode derivatives are not supported, "
            "got a dual tensor"
        )


@contextmanager
def op_errors(name: str) -> Iterator[None]:
    """Errors of the checks inside as those of the operator ``varstream::name``.

    An operator checks again what its public wrapper has checked: a direct call has not.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise RuntimeError(f"varstream::{name}: {error}") from None


def check_same_dtype(**tensors: Tensor | None) -> torch.dtype:
    """Check that all named tensors that are given share one dtype and return it."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first, *rest = given.items()
    for name, tensor in rest:
        if tensor.dtype != first[1].dtype:
            raise ValueError(
                f"{name} must have the dtype of {first[0]} ({first[1].dtype}), got {tensor.dtype}"
            )
    return first[1].dtype


def check_float(
    name: str, value: Any, *, low: float | None = None, high: float | None = None
) -> float:
    """Check a real number, finite and within ``[low, high]``, and return it as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        bits = int(value).bit_length()
        raise ValueError(f"{name} must be finite as a float, got an int of {bits} bits") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be finite, got {value}")
    if low is not None and number < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")
    if high is not None and number > high:
        raise ValueError(f"{name} must be <= {high}, got {value}")
    return number


def check_positive(name: str, value: Any) -> float:
    """Check a finite number above 0."""
    number = check_float(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return number


def check_int(name: str, value: Any, *, low: int | None = None) -> int:
    """Check an integer (a ``SymInt`` while compiling) of at most 64 bits, not below ``low``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if isinstance(value, str) and _SIZE.fullmatch(value):
            raise TypeError(
                f"{name} must be an int, got {value!r}; give a number of bytes such as 16 << 30"
            )
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        bits = value.bit_length()
        raise ValueError(
            f"{name} must fit an int of 64 bits (at most 2**63 - 1), got one of {bits} bits"
        )
    if low is not None and value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")
    return value  # type: ignore[return-value]


def check_bool(name: str, value: Any) -> bool:
    """Check a bool and return it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def check_device(name: str, value: Any) -> torch.device:
    """Check a device, or what names one, and return it; whether it is there is not looked at."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"{name} must be a device such as 'cpu', got {value!r}") from None


def check_mask_values(name: str, mask: Tensor) -> None:
    """Check that a floating mask holds 0 and 1 only: read as nonzero, an additive one is inverted.

    Reads values; callers decide whether they are visible.
    """
    if mask.is_floating_point():
        odd = mask[(mask != 0) & (mask != 1)]
        if odd.numel():
            raise ValueError(
                f"{name} of dtype {mask.dtype} must hold 0 and 1, got {odd[0].item()} "
                "(an additive mask?)"
            )


def check_normalizer(value: Any, count: Tensor, like: Tensor, name: str = "normalizer") -> Tensor:
    """Check a divisor given as a number or a tensor of one element and return it as ().

    It comes detached, in the dtype and on the device of ``like``, and as 1 where ``count`` () is 0:
    a sum over nothing stays 0. Its value is checked where that costs no device synchronisation.
    """
    if isinstance(value, Tensor):
        check_tensor(name, value)
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
        if value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{name} must have a real dtype, got {value.dtype}")
    else:
        if not isinstance(value, torch.SymInt):
            value = check_float(name, value, low=0.0, high=torch.finfo(like.dtype).max)
        value = torch.full_like(like, value, requires_grad=False)
    divisor = value.detach().reshape(()).to(like)
    if values_visible(count, divisor) and bool(count > 0) and not bool(divisor > 0):
        raise ValueError(f"{name} must be above 0, got {float(divisor)}")
    return torch.where(count == 0, 1.0, divisor)


def check_cu_seqlens(
    name: str, value: Any, total: int | None, device: torch.device, validate: bool = False
) -> Tensor:
    """Check cumulative lengths ``(B+1,)`` int32: start at 0, never fall, end at ``total``.

    Values are read where that costs no device synchronisation (CPU tensors outside compilation),
    or with ``validate``.
    """
    if isinstance(value, Tensor) and value.dtype == torch.int64:
        raise ValueError(f"{name} must have dtype int32, got int64; use {name}.to(torch.int32)")
    cu = check_tensor(name, value, ndim=1, dtypes=(torch.int32,), device=device, layout="(B+1,)")
    if cu.shape[0] < 1:
        raise ValueError(f"{name} must have at least one entry (B+1,), got shape {tuple(cu.shape)}")
    if values_visible(cu, validate=validate):
        check_cu_values(name, cu, total)
    return cu


def check_cu_values(name: str, cu: Tensor, total: int | None) -> list[int]:
    """Check the values of CPU cumulative lengths and return them as a list."""
    values: list[int] = cu.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}")
    for i, (a, b) in enumerate(zip(values, values[1:], strict=False)):
        if b < a:
            raise ValueError(f"{name} must never fall, got {a} then {b} at entry {i + 1}")
    if total is not None and values[-1] != total:
        raise ValueError(f"{name} must end at the number of rows {total}, got {values[-1]}")
    return values
