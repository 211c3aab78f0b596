"""torch's ``nn.LinearCrossEntropyOptions``: what can be honoured, and the refusal of the rest."""

from __future__ import annotations

from typing import Any

import torch

from varstream._checks import acc_dtype

_POLICIES = ("auto", "accurate")


def chunk_size_from_options(options: Any, chunk_size: int | None, dtype: torch.dtype) -> int | None:
    """The chunk size that ``options`` and ``chunk_size`` ask for together.

    ``allow_retain_graph`` needs nothing: a second backward works with ``retain_graph=True`` either
    way. Accumulation is in float32 (float64 for float64 inputs), which is torch's "accurate".

    Raises:
        TypeError: ``options`` is no ``LinearCrossEntropyOptions``, or torch has no such class.
        ValueError: a field that isn't honoured, or two different chunk sizes.
    """
    if options is None:
        return chunk_size
    kind = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if kind is None or not isinstance(options, kind):
        raise TypeError(
            "options must be a torch.nn.LinearCrossEntropyOptions (torch >= 2.13) or None, "
            f"got {type(options).__name__}"
        )
    if options.acc_policy not in _POLICIES:
        raise ValueError(
            f"options.acc_policy must be one of {', '.join(_POLICIES)}: everything accumulates in "
            f"the accumulation dtype, got {options.acc_policy!r}"
        )
    acc = acc_dtype(dtype)
    if options.acc_dtype not in (None, acc):
        raise ValueError(
            f"options.acc_dtype must be None or {acc} for {dtype} inputs, got {options.acc_dtype}"
        )
    if options.chunking_method not in (None, "auto"):
        raise ValueError(
            "options.chunking_method must be 'auto' or None (chunk_size and "
            f"options.batch_chunk_size count rows), got {options.chunking_method!r}"
        )
    wanted = options.batch_chunk_size
    if wanted is not None and chunk_size not in (None, wanted):
        raise ValueError(
            "chunk_size and options.batch_chunk_size must agree where both are given, "
            f"got {chunk_size} and {wanted}"
        )
    return chunk_size if wanted is None else wanted
