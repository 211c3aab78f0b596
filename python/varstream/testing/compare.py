"""How far two results are apart, and the project's rule for low precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``, in float64; infinities must agree
    exactly.

    0 when both are empty or zero; ``inf`` when only ``expected`` is zero or a NaN or infinity
    differs.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    finite = expected.isfinite()
    if not torch.equal(actual[~finite], expected[~finite]) or not actual[finite].isfinite().all():
        return float("inf")
    difference = (actual[finite] - expected[finite]).norm().item()
    size = expected[finite].norm().item()
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def assert_exact(
    actual: Tensor, expected: Tensor, tolerance: float = 1e-12, name: str = "result"
) -> None:
    """Assert ``relative_error(actual, expected) <= tolerance``; a zero ``expected`` allows that
    much absolutely."""
    error = relative_error(actual, expected)
    if error == float("inf") and expected.isfinite().all() and not expected.any():
        error = actual.detach().abs().max().item()
    assert error <= tolerance, f"{name}: relative error {error:.3e} exceeds {tolerance:.1e}"


def assert_error_ratio(
    actual: Tensor, plain: Tensor, exact: Tensor, ratio: float = 2.0, name: str = "result"
) -> None:
    """The error-ratio rule: at most ``ratio`` times the error of plain PyTorch in the same low
    precision.

    Args:
        actual: our result.
        plain: plain PyTorch's result in the same dtype.
        exact: the float64 reference.
        ratio: 2 for results and gradients, 3 for gradients with softcap.
    """
    ours, theirs = relative_error(actual, exact), relative_error(plain, exact)
    noise = torch.finfo(actual.dtype).eps / 8
    assert ours <= ratio * theirs + noise, (
        f"{name}: relative error {ours:.3e} exceeds {ratio} x {theirs:.3e} of plain PyTorch"
    )


def worst_gradient(
    actual: Iterable[tuple[str, Tensor | None]], expected: Mapping[str, Tensor | None]
) -> tuple[str, float]:
    """Name and relative error of the parameter whose gradients are furthest apart.

    Args:
        actual: pairs of parameter name and gradient.
        expected: gradient by parameter name; a missing gradient counts as zeros.
    """
    worst = ("", 0.0)
    for name, grad in actual:
        want = expected[name]
        if grad is None and want is None:
            continue
        shape = (grad if grad is not None else want).shape  # type: ignore[union-attr]
        error = relative_error(*(torch.zeros(shape) if g is None else g for g in (grad, want)))
        if not worst[0] or error > worst[1]:
            worst = (name, error)
    return worst
