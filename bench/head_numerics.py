#!/usr/bin/env python3
"""Rounding errors of the head against float64: ours, plain PyTorch's, torch's chunked head.

python -m bench.head_numerics                  # the tables of docs/numerics.md, in minutes
python -m bench.head_numerics --rows 256 --width 64 --classes 2048

On a CPU ours is the driver that serves CUDA with the row kernels emulated; the matrix products are
the CPU's. Nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import varstream as vs
from varstream.testing import relative_error

SCALES = (3.0, 6.0, 12.0)
CHUNKS = (1, 4, 8, 32)
LIKELY = 0.75  # of rows have a target that is made likely
LOW = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    rows: int = 2048  # N
    width: int = 512  # d
    classes: int = 16384  # V


@dataclass(frozen=True)
class Problem:
    """A head whose operands are bfloat16 numbers."""

    x: Tensor  # (N, d)
    weight: Tensor  # (V, d)
    target: Tensor  # (N,)

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(self, x=self.x.to(dtype), weight=self.weight.to(dtype))


def problem(sizes: Sizes, scale: float, seed: int = 0) -> Problem:
    """Logits of standard deviation ``scale``; the likely targets' logits lie up to 8 above what the
    row's log-sum-exp was, and down to 2 below."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sizes.rows, sizes.width, generator=generator)
    weight = torch.randn(sizes.classes, sizes.width, generator=generator) / sizes.width**0.5
    target = torch.randint(sizes.classes, (sizes.rows,), generator=generator)
    x *= scale
    own = weight[target]
    logits = x @ weight.t()
    above = torch.rand(sizes.rows, generator=generator) * 10 - 2
    missing = logits.logsumexp(1) + above - (x * own).sum(1)
    missing *= torch.rand(sizes.rows, generator=generator) < LIKELY
    x += own * (missing / own.square().sum(1))[:, None]
    return Problem(x.to(LOW), weight.to(LOW), target)


@dataclass(frozen=True)
class Found:
    """What a head yields of a problem: losses of the rows, gradients of their mean."""

    losses: Tensor  # (N,)
    x: Tensor
    weight: Tensor


Losses = Callable[[Tensor, Tensor, Tensor, str], Tensor]  # x, weight, target, reduction


def found(p: Problem, losses: Losses) -> Found:
    x, weight = p.x.detach().requires_grad_(), p.weight.detach().requires_grad_()
    grads = torch.autograd.grad(losses(x, weight, p.target, "mean"), (x, weight))
    with torch.no_grad():
        return Found(losses(x, weight, p.target, "none"), *grads)


def ours(logits_dtype: torch.dtype | None = None, chunk_size: int | None = None) -> Losses:
    def losses(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
        return vs.linear_cross_entropy(
            x,
            weight,
            target,
            reduction=reduction,
            logits_dtype=logits_dtype,
            chunk_size=chunk_size,
        )

    return losses


def torch_head(**fields: Any) -> Losses:
    """torch's head (2.13 and later); fields of its options, none for none."""
    options = torch.nn.LinearCrossEntropyOptions(**fields) if fields else None

    def losses(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.linear_cross_entropy(x, weight, target, reduction=reduction, options=options)

    return losses


def plain(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(
        (x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32)),
        target,
        reduction=reduction,
    )


SCHEMES: dict[str, Losses] = {
    "ours, float32 logits (default)": ours(),
    "ours, `logits_dtype=bfloat16`": ours(LOW),
    "plain PyTorch in bfloat16": plain,
}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    SCHEMES |= {
        "`F.linear_cross_entropy`": torch_head(),
        "the same in chunks, `LinearCrossEntropyOptions()`": torch_head(acc_policy="auto"),
        'the same in chunks, `acc_policy="accurate"`': torch_head(acc_policy="accurate"),
    }


@dataclass(frozen=True)
class Errors:
    """Relative Frobenius errors of the gradients, mean absolute error of the rows' losses."""

    x: float
    weight: float
    loss: float


def errors(own: Found, true: Found) -> Errors:
    return Errors(
        relative_error(own.x, true.x),
        relative_error(own.weight, true.weight),
        float((own.losses.double() - true.losses).abs().mean()),
    )


def scheme_errors(sizes: Sizes, scale: float) -> dict[str, Errors]:
    p = problem(sizes, scale)
    true = found(p.to(torch.float64), plain)
    return {name: errors(found(p, losses), true) for name, losses in SCHEMES.items()}


# --- the weight's gradient over chunks ------------------------------------------------------------


def into_buffer(p: Problem, chunk_size: int) -> Tensor:
    """The weight's gradient, added chunk by chunk to a bfloat16 buffer of the caller's."""
    x, weight = p.x.detach().requires_grad_(), p.weight.detach().requires_grad_()
    buffer = torch.zeros_like(weight)
    vs.linear_cross_entropy(
        x, weight, p.target, chunk_size=chunk_size, weight_grad=buffer
    ).backward()
    return buffer


def chunk_errors(sizes: Sizes, scale: float) -> dict[str, dict[int, float]]:
    """Relative error of dW by number of chunks."""
    p = problem(sizes, scale)
    true = found(p.to(torch.float64), plain).weight

    def torch_chunks(size: int) -> Tensor:
        return found(p, torch_head(chunking_method=None, batch_chunk_size=size)).weight

    makes: dict[str, Callable[[int], Tensor]] = {
        "ours (sum in float32)": lambda size: found(p, ours(chunk_size=size)).weight,
        "ours, `weight_grad` a bfloat16 buffer": lambda size: into_buffer(p, size),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        makes["`F.linear_cross_entropy`, default policy"] = torch_chunks
    return {
        name: {c: relative_error(make(-(-sizes.rows // c)), true) for c in CHUNKS}
        for name, make in makes.items()
    }


# --- the target's entry ---------------------------------------------------------------------------


@dataclass(frozen=True)
class EntryErrors:
    """Relative errors of G's entry at targets with p > 0.9."""

    mean: float
    worst: float


def entry_errors(rows: int, classes: int, scale: float = 3.0) -> dict[str, EntryErrors]:
    """A head with the identity as its weight: the input is the logits, its gradient is G."""
    base = problem(Sizes(rows, classes, classes), scale)
    logits = (base.x @ base.weight.t()).to(LOW)
    p = Problem(logits, torch.eye(classes, dtype=LOW), base.target)
    chance = logits.double().softmax(1)
    at = (torch.arange(rows), p.target)
    sure = chance[at] > 0.9
    true = ((chance[at] - 1) / rows)[sure]

    def of(entries: Tensor) -> EntryErrors:
        error = ((entries[sure].double() - true) / true).abs()
        return EntryErrors(float(error.mean()), float(error.max()))

    rounded = (chance / rows).to(LOW)
    return {
        "ours": of(found(p, ours()).x[at]),
        "plain PyTorch in bfloat16": of(found(p, plain).x[at]),
        "1/N subtracted from a bfloat16 p/N": of((rounded - 1 / rows)[at]),
    }


# --- the tables -----------------------------------------------------------------------------------


@contextmanager
def kernels() -> Iterator[None]:
    """Inside, CPU tensors of the head go through the CUDA drivers and emulated row kernels."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from emulation import emulated

    with emulated():
        yield


def table(head: list[str], lines: dict[str, list[str]]) -> str:
    rows = [head, ["---"] * len(head), *([name, *cells] for name, cells in lines.items())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def scheme_table(sizes: Sizes) -> str:
    by_scale = {scale: scheme_errors(sizes, scale) for scale in SCALES}
    head = ["scheme", *(f"dX, s = {s:g}" for s in SCALES), *(f"dW, s = {s:g}" for s in SCALES)]
    lines = {
        name: [
            *(f"{by_scale[s][name].x:.1e}" for s in SCALES),
            *(f"{by_scale[s][name].weight:.1e}" for s in SCALES),
            *(f"{by_scale[s][name].loss:.1e}" for s in SCALES),
        ]
        for name in SCHEMES
    }
    return table([*head, *(f"loss, s = {s:g}" for s in SCALES)], lines)


def chunk_table(sizes: Sizes) -> str:
    found_errors = chunk_errors(sizes, SCALES[0])
    head = ["dW, s = 3", *(f"{c} chunk{'s' if c > 1 else ''}" for c in CHUNKS)]
    return table(
        head,
        {name: [f"{by[c]:.2e}" for c in CHUNKS] for name, by in found_errors.items()},
    )


def entry_table(sizes: Sizes) -> str:
    found_errors = entry_errors(sizes.rows, min(1024, sizes.classes))
    return table(
        ["target's entry, p > 0.9", "mean", "worst"],
        {name: [f"{e.mean:.2%}", f"{e.worst:.2%}"] for name, e in found_errors.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    sizes = Sizes(**vars(parser.parse_args()))
    with kernels():
        print("\n\n".join(make(sizes) for make in (scheme_table, chunk_table, entry_table)))


if __name__ == "__main__":
    main()
