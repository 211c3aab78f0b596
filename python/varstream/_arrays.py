"""Arrays from whatever callers hold: lists, arrays, tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from varstream._checks import check_tensor

_NUMPY_FLOATS = (torch.float64, torch.float32, torch.float16)


def host_array(name: str, values: Any) -> np.ndarray:
    """Booleans or numbers as an array on the host, sharing memory with ``values`` where it can.

    Raises:
        TypeError: ragged lists, other things than numbers, or a tensor dtype that NumPy lacks.
        ValueError: a tensor that is sparse or holds no values.
    """
    tensor = isinstance(values, torch.Tensor)
    if tensor and check_tensor(name, values).is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
    if tensor and values.dtype.is_floating_point and values.dtype not in _NUMPY_FLOATS:
        raise TypeError(f"{name} must have a dtype that NumPy has, got {values.dtype}")
    try:
        array = values.detach().cpu().numpy() if tensor else np.asarray(values)
    except ValueError:
        raise TypeError(f"{name} must hold numbers, got lists of unequal lengths") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold numbers, got {array.dtype}")
    return array


def int_array(name: str, values: Any, *, copy: bool = False) -> np.ndarray:
    """One dimension of integers as a contiguous int64 array.

    Args:
        name: the argument's name in the public signature.
        values: (n,) list, tuple, integer array or integer tensor (copied from its device).
        copy: make sure that the result shares no memory with ``values``.

    Raises:
        TypeError: no such sequence, a ragged one, or one of other things than integers.
        ValueError: more than one dimension, or integers past int64.
    """
    kinds = (Sequence, np.ndarray, torch.Tensor)
    if not isinstance(values, kinds) or isinstance(values, (str, bytes)):
        raise TypeError(
            f"{name} must be a list, array or tensor of integers, got {type(values).__name__}"
        )
    array = host_array(name, values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype == bool or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension (n,), got shape {array.shape}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must be below 2**63, got {array.max()}")
    if copy and isinstance(values, np.ndarray):  # a list has been copied already
        return array.astype(np.int64, order="C")
    return np.ascontiguousarray(array, dtype=np.int64)
