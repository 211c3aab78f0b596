"""Imports the compiled module once, after torch; Python kernels attach to its operators here.

The schemas live in C++ (``csrc/torch/library.cpp``). CPU kernels, fakes and autograd formulas
attach to them from Python with the decorators below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

NAMESPACE = "varstream"
MIN_TORCH = (2, 11)

Fn = TypeVar("Fn", bound=Callable[..., Any])


def _torch_version() -> tuple[int, int]:
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def _load_extension() -> Any:
    if _torch_version() < MIN_TORCH:
        raise ImportError(
            f"varstream needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, found {torch.__version__}"
        )
    try:
        from varstream import _C
    except ImportError as error:
        raise ImportError(
            "varstream's compiled module varstream._C could not be loaded "
            f"({error}). Build it for this Python and this torch with: "
            "pip install --no-build-isolation ."
        ) from error
    return _C


extension = _load_extension()

# Registrations live exactly as long as this object.
_library = torch.library.Library(NAMESPACE, "IMPL")

# Operators whose CUDA tensors are served by ATen calls, for ``varstream info``.
composed_on_cuda: set[str] = set()


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def has_cuda_kernel(name: str) -> bool:
    """Whether a compiled kernel serves the operator's CUDA tensors."""
    return name not in composed_on_cuda and _has_kernel(name, "CUDA")


def cpu_kernel(name: str) -> Callable[[Fn], Fn]:
    """Register the decorated function as ``varstream::name`` for CPU tensors."""

    def register(fn: Fn) -> Fn:
        _library.impl(name, fn, "CPU")
        return fn

    return register


def composed_kernel(
    name: str, driver: Callable[..., Any] | None = None, on: str = ""
) -> Callable[[Fn], Fn]:
    """Register the decorated function for CPU tensors and, where none is compiled, CUDA tensors.

    For kernels composed from ATen calls that run on any device. ``driver`` takes its place for CUDA
    tensors where the operator ``on``, which it calls, has a compiled kernel.
    """

    def register(fn: Fn) -> Fn:
        _library.impl(name, fn, "CPU")
        if driver is not None and _has_kernel(on, "CUDA"):
            _library.impl(name, driver, "CUDA")
        elif not _has_kernel(name, "CUDA"):
            _library.impl(name, fn, "CUDA")
            composed_on_cuda.add(name)
        return fn

    return register


def fake_kernel(name: str) -> Callable[[Fn], Fn]:
    """Register the decorated function as the shape and dtype rule of ``varstream::name``."""

    def register(fn: Fn) -> Fn:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fn, lib=_library)
        return fn

    return register


def autograd(name: str, setup_context: Callable[..., None] | None = None) -> Callable[[Fn], Fn]:
    """Register the decorated function as the backward formula of ``varstream::name``."""

    def register(fn: Fn) -> Fn:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", fn, setup_context=setup_context, lib=_library
        )
        return fn

    return register
