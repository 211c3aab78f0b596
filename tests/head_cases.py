"""Dense reference, problems and option sets of the head's tests."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_cases import Backend
from torch import Tensor

import varstream as vs
from varstream._checks import acc_dtype
from varstream.reference import head as blocks
from varstream.testing import assert_exact, relative_error

ROWS = [0, 1, 2, 13, 15, 16, 17]  # none, one, a prime, a chunk edge and its neighbours
CHUNK_SIZES = [1, 4, 7, 16, None]
REDUCTIONS = ["mean", "sum", "none"]
IGNORE = -100

# What happens between the linear layer and the softmax
SCALINGS: dict[str, dict[str, float]] = {
    "plain": {},
    "scale": {"logit_scale": 0.7},
    "temperature": {"temperature": 1.6},
    "softcap": {"softcap": 2.5},
    "all": {"logit_scale": -1.3, "softcap": 4.0, "temperature": 0.8},
}

# Which of 16 rows are ignored
IGNORED = {
    "none": [],
    "first": [0],
    "last": [15],
    "ends": [0, 1, 15],
    "middle": [5, 6, 7, 11],
    "alternate": [*range(0, 16, 2)],
    "all_but_one": [*range(9), *range(10, 16)],
    "all": [*range(16)],
}


def shrink_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the inner blocks small enough for a few of them to come up in a small problem."""
    monkeypatch.setattr(blocks, "_WEIGHT_ELEMENTS", 7 * 9)  # 7 classes of width 9
    monkeypatch.setattr(blocks, "_MIN_WEIGHT_ROWS", 1)
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", 2 * 23)  # 2 rows of 23 classes


@dataclass
class Problem:
    """A head's operands: input (N, d), weight (V, d), bias (V,) or None, target (N,)."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor  # or (N, K)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        given = (self.input, self.weight, self.bias)
        return tuple(t for t in given if t is not None)

    @property
    def acc(self) -> torch.dtype:
        return acc_dtype(self.input.dtype)

    @property
    def valid(self) -> Tensor:
        return self.target != IGNORE

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype, as new leaves."""
        bias = None if self.bias is None else self.bias.detach().to(dtype).requires_grad_()
        return Problem(
            self.input.detach().to(dtype).requires_grad_(),
            self.weight.detach().to(dtype).requires_grad_(),
            bias,
            self.target,
        )

    def on(self, backend: Backend, dtype: torch.dtype) -> Problem:
        """The same values as new leaves of a dtype where the back end runs."""
        cast = self.cast(dtype)
        tensors = (cast.input, cast.weight, cast.bias)
        moved = [None if t is None else leaf(backend.here(t.detach())) for t in tensors]
        assert moved[0] is not None and moved[1] is not None
        return Problem(moved[0], moved[1], moved[2], backend.here(self.target))

    def logits(
        self, logit_scale: float = 1.0, softcap: float = 0.0, temperature: float = 1.0
    ) -> Tensor:
        """All of them (N, V), by ordinary autograd."""
        z = torch.nn.functional.linear(self.input, self.weight, self.bias) * logit_scale
        if softcap > 0:
            z = softcap * torch.tanh(z / softcap)
        return z / temperature

    def dense_logprobs(self, **scaling: float) -> tuple[Tensor, Tensor]:
        """log p(target) and entropy, (N,) each, 0 at ignored rows."""
        logp = self.logits(**scaling).log_softmax(-1)
        picked = logp.gather(1, self.target.long().clamp(min=0)[:, None]).squeeze(1)
        entropy = -(logp.exp() * logp).sum(1)
        return picked * self.valid, entropy * self.valid

    def dense_loss(self, reduction: str, **scaling: float) -> Tensor:
        """Plain PyTorch's loss, 0 rather than NaN with every row ignored."""
        loss = torch.nn.functional.cross_entropy(
            self.logits(**scaling), self.target.long(), reduction="none", ignore_index=IGNORE
        )
        if reduction == "none":
            return loss
        return loss.sum() / (self.valid.sum().clamp(min=1) if reduction == "mean" else 1)


def leaf(t: Tensor) -> Tensor:
    return t.requires_grad_()


def problem(
    rows: int = 16,
    width: int = 9,
    classes: int = 23,
    *,
    bias: bool = True,
    ignored: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    spread: float = 1.0,
) -> Problem:
    """Random operands that require gradients; ``spread`` scales the logits."""
    target = torch.randint(0, classes, (rows,))
    target[[r for r in ignored or [] if r < rows]] = IGNORE
    return Problem(
        torch.randn(rows, width, dtype=dtype, requires_grad=True),
        (torch.randn(classes, width, dtype=dtype) * spread).requires_grad_(),
        torch.randn(classes, dtype=dtype, requires_grad=True) if bias else None,
        target,
    )


def loss_of(p, reduction="mean", **options):
    return vs.linear_cross_entropy(
        p.input, p.weight, p.target, linear_bias=p.bias, reduction=reduction, **options
    )


# --- every option ---------------------------------------------------------------------------------

# One value of each option, made for a problem; several at once are merged.
FEATURES = {
    "class_weight": lambda p: {"weight": class_weight(p)},
    "smoothing": lambda p: {"label_smoothing": 0.13},
    "z_loss": lambda p: {"z_loss": 0.03},
    "token_weight": lambda p: {"token_weight": token_weight(p)},
    "softcap": lambda p: {"softcap": 2.5},
    "scaling": lambda p: {"logit_scale": -1.3, "temperature": 0.8},
}


EVERYTHING = tuple(FEATURES)


def options_of(p: Problem, names: Iterable[str]) -> dict[str, Any]:
    """The named features' options, merged."""
    return {key: value for name in names for key, value in FEATURES[name](p).items()}


def class_weight(p: Problem) -> Tensor:
    """Class weights (V,), a zero and a negative one among them."""
    weight = torch.rand(p.weight.shape[0], dtype=p.acc) + 0.2
    weight[::5], weight[1::7] = 0.0, -0.1
    return weight


def token_weight(p: Problem) -> Tensor:
    """Factors like target of both signs, some 0."""
    weight = torch.randn(p.target.shape, dtype=p.acc)
    weight.view(-1)[1::4] = 0.0
    return weight


def several_targets(p: Problem, number: int = 3) -> Problem:
    """The problem with targets (N, K): duplicates in a row, some ignored, the rows that were
    ignored entirely so."""
    rows, classes = p.target.shape[0], p.weight.shape[0]
    target = torch.randint(0, classes, (rows, number))
    target[::4, -1] = target[::4, 0]
    target[1::3, 0] = IGNORE
    target[2::5] = target[2::5, :1]
    target[~p.valid] = IGNORE
    return Problem(p.input, p.weight, p.bias, target)


def dense(
    p: Problem,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    normalizer: float | None = None,
    **scaling: float,
) -> Tensor:
    """The contract of ``linear_cross_entropy`` written out with all logits, by autograd."""
    z = p.logits(**scaling)
    logp = z.log_softmax(-1)
    target = p.target.long() if p.target.dim() == 2 else p.target.long()[:, None]
    valid = target != IGNORE
    index = target.clamp(min=0)
    w = z.new_ones(z.shape[1]) if weight is None else weight.to(z.dtype)
    factor = torch.ones_like(target, dtype=z.dtype)
    if token_weight is not None:
        factor = token_weight.to(z.dtype).view(target.shape)
    losses = -(1 - label_smoothing) * w[index] * logp.gather(1, index)
    if label_smoothing > 0:
        losses = losses - label_smoothing / z.shape[1] * (logp * w).sum(1, keepdim=True)
    losses = torch.where(valid, losses * factor, 0.0)
    rows = valid.any(1)
    z_terms = z_loss * torch.where(rows, z.logsumexp(1).square(), 0.0)
    if reduction == "none":
        first = valid & (valid.cumsum(1) == 1)
        return (losses + first * z_terms[:, None]).view(p.target.shape)
    if reduction == "sum":
        return losses.sum() + z_terms.sum()
    if not rows.any():
        return losses.sum() * 0.0
    divisor = (w[index] * valid).sum() if normalizer is None else normalizer
    return losses.sum() / divisor + z_terms.sum() / rows.sum()


# --- on three back ends ---------------------------------------------------------------------------

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = ("emulated", "cuda")
# Errors of what kernels yield in float32, relative to its size plus 1, and of float32 gradients.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 5e-6, 1e-5
CANCELLED = 2e-7  # what is left of gradients whose float32 terms cancel to nothing, a value
LEAVES = ("input", "weight", "bias")


def dtypes_of(backend: Backend) -> tuple[torch.dtype, ...]:
    """What a back end runs the head in: float64 by composed operators, else the kernels' dtypes."""
    return (torch.float64,) if backend.exact else KERNEL_DTYPES


def turn(backend: Backend, *case: Any) -> list[torch.dtype]:
    """One of the back end's dtypes: the cases of a grid take turns."""
    dtypes = dtypes_of(backend)
    return [dtypes[zlib.crc32(repr(case).encode()) % len(dtypes)]]


def here(backend: Backend, options: dict[str, Any]) -> dict[str, Any]:
    return {name: backend.here(value) for name, value in options.items()}


def check(
    backend: Backend,
    p: Any,
    ours: Callable[[Any], Tensor | Sequence[Tensor]],
    theirs: Callable[[Any], Tensor | Sequence[Tensor]],
    *,
    ratio: float = 2.0,
    dtypes: Sequence[torch.dtype] = (),
    tolerance: float = 1e-12,
    rounded: bool = False,
) -> None:
    """What ``ours`` yields for a problem, and the leaves' gradients of it under random upstream
    gradients, against the same of ``theirs`` in float64 on the CPU.

    In float64 to ``tolerance``. Else the kernels' values, float32 in every dtype, to another unless
    their logits are ``rounded``, and gradients by the error-ratio rule against ``theirs`` in that
    dtype; in float32 to a tolerance as well, unless plain PyTorch is further off.
    """
    for dtype in dtypes or dtypes_of(backend):
        q = p.on(backend, dtype)
        exact, plain = p.cast(dtype).cast(torch.float64), p.cast(dtype)
        got, want = _outputs(ours(q)), _outputs(theirs(exact))
        rough = _outputs(theirs(plain))
        for i, (a, b, c) in enumerate(zip(got, rough, want, strict=True)):
            assert a.dtype == acc_dtype(dtype), f"output {i} is {a.dtype}"
            if dtype == torch.float64:
                assert_exact(a, c, tolerance, f"output {i}")
            elif rounded:
                assert_ratio(a.cpu(), b, c, ratio, f"output {i}")
            else:
                assert_values(a.cpu(), c, f"output {i} in {dtype}")
        upstream = [torch.randn_like(w) for w in want]
        found = _gradients(got, q.leaves, upstream)
        wanted = _gradients(want, exact.leaves, upstream)
        assert [g.dtype for g in found] == [dtype] * len(wanted)
        if dtype == torch.float64:
            for name, a, b in zip(LEAVES, found, wanted, strict=False):
                assert_exact(a, b, tolerance, f"gradient of {name}")
            continue
        others = _gradients(rough, plain.leaves, upstream)
        for name, a, b, c in zip(LEAVES, found, others, wanted, strict=False):
            if dtype == torch.float32 and relative_error(a, c) <= GRADIENT_TOLERANCE:
                continue
            assert_ratio(a, b, c, ratio, f"gradient of {name}")


def check_loss(
    backend: Backend,
    p: Problem,
    reduction: str = "mean",
    dtypes: Sequence[torch.dtype] = (),
    **options: Any,
) -> None:
    """linear_cross_entropy with these options against the contract written out."""
    given = {k: v for k, v in options.items() if k not in ("chunk_size", "max_rows")}

    def ours(q: Problem) -> Tensor:
        loss: Tensor = loss_of(q, reduction, **here(backend, options))
        return loss

    ratio = 3.0 if options.get("softcap") else 2.0
    check(backend, p, ours, lambda q: dense(q, reduction, **given), ratio=ratio, dtypes=dtypes)


def assert_values(
    ours: Tensor, want: Tensor, name: str, tolerance: float = VALUE_TOLERANCE
) -> None:
    """Each value near to ``tolerance``, relative to its size plus 1; infinities must agree."""
    assert ours.shape == want.shape and ours.dtype == torch.float32, f"{name}: shape or dtype"
    finite = want.isfinite()
    assert torch.equal(ours[~finite].double(), want[~finite]), f"{name}: infinities differ"
    error = (ours - want)[finite].abs() / (1 + want[finite].abs())
    assert (error <= tolerance).all(), f"{name} is off by {error.max():.2e}"


def _outputs(result: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else result


def _gradients(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[Tensor]:
    moved = [u.to(o) for u, o in zip(upstream, outputs, strict=True)]
    return [g.cpu() for g in torch.autograd.grad(outputs, leaves, moved)]


def assert_ratio(ours: Tensor, plain: Tensor, want: Tensor, ratio: float, name: str) -> None:
    """The error-ratio rule for a low-precision result and for its worst row.

    One rounding of the result itself is allowed besides: of few values plain PyTorch may hit all.
    """
    assert ours.shape == want.shape and ours.isfinite().all(), f"{name}: shape, or not finite"
    if not ours.numel():
        return
    info = torch.finfo(ours.dtype)
    noise = info.eps / 4
    if not plain.isfinite().all():  # float16 underflows in plain PyTorch: a few roundings, then
        plain, noise = want, 2 * info.eps
    a, b = ((t.detach().double() - want) for t in (ours, plain))
    allowed = ratio * b.norm() + noise * want.norm() + CANCELLED * want.numel() ** 0.5
    assert a.norm() <= allowed, f"{name} in {ours.dtype} is off by {a.norm()}, plain by {b.norm()}"
    if want.dim() < 2:
        return
    worst, other = a.norm(dim=1).max(), b.norm(dim=1).max()
    allowed = ratio * other + noise * want.norm(dim=1).max() + CANCELLED * want.shape[1] ** 0.5
    assert worst <= allowed, f"{name} in {ours.dtype}: a row is off by {worst}, plain by {other}"


def assert_same_loss(p, loss, expected, tolerance=1e-12):
    """Loss and gradients of every leaf equal under one non-uniform upstream gradient."""
    assert_exact(loss, expected, tolerance, "loss")
    upstream = torch.randn_like(expected)
    actual = torch.autograd.grad(loss, p.leaves, upstream.to(loss.dtype))
    wanted = torch.autograd.grad(expected, p.leaves, upstream)
    for name, ours, theirs in zip(("input", "weight", "bias"), actual, wanted, strict=False):
        assert ours.dtype == theirs.dtype
        assert_exact(ours, theirs, tolerance, name)
