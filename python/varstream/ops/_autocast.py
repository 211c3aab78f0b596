"""What autocast makes of an operator's operands: the wrappers cast before they check dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _enabled(values: tuple[Any, ...]) -> tuple[bool, str]:
    """Whether autocast is on where the first tensor lives, and that device's type."""
    kind = next((v.device.type for v in values if isinstance(v, Tensor)), "cpu")
    return kind != "meta" and torch.is_autocast_enabled(kind), kind  # it knows no meta device


def cast_for_autocast(*values: Any) -> tuple[Any, ...]:
    """Autocast's rule for matrix products: floating tensors in its dtype, float64 as it is.

    ``None`` and what is no tensor pass through: the checks come afterwards.
    """
    on, kind = _enabled(values)
    if not on:
        return values
    dtype = torch.get_autocast_dtype(kind)
    return tuple(v.to(dtype) if _floating(v) and v.dtype != torch.float64 else v for v in values)


def float_for_autocast(*values: Any) -> tuple[Any, ...]:
    """Autocast's rule for norms: bfloat16 and float16 tensors in float32."""
    if not _enabled(values)[0]:
        return values
    low = (torch.bfloat16, torch.float16)
    return tuple(v.float() if _floating(v) and v.dtype in low else v for v in values)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
