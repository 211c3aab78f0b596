"""Benchmark of the head on the CPU: ``python -m bench.head``.

Forward and backward of the loss against two yardsticks timed in the same rounds: its three matrix
products done plainly over all rows into memory allocated beforehand (a floor: no softmax, no page
of memory touched for the first time), and torch's own chunked ``F.linear_cross_entropy``. Results
are compared with plain dense PyTorch before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import varstream as vs
from bench import timing
from varstream.testing import peak_memory, relative_error

TOLERANCE = 2e-5  # float32 against float32, gradients summed over thousands of rows


@dataclass(frozen=True)
class Case:
    """One shape and the bars it must keep, if any."""

    name: str
    rows: int
    width: int
    classes: int
    bars: tuple[tuple[str, float], ...] = ()


MAIN_BARS = (("memory_over_logits", 0.15), ("over_three_products", 1.08), ("over_torch", 1.03))
CASES = [
    Case("main", 4096, 512, 32000, MAIN_BARS),
    Case("short", 1024, 512, 32000),
    Case("wide", 1024, 2048, 32000),
]


class Operands:
    """Input (N, d) and weight (V, d), float32, that require gradients; targets (N,)."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.input = torch.randn(case.rows, case.width).requires_grad_()
        self.weight = (torch.randn(case.classes, case.width) * 0.05).requires_grad_()
        self.target = torch.randint(0, case.classes, (case.rows,))
        self.upstream = torch.rand(case.rows)

    def backward(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run ``loss.backward()``; returns loss and gradients, and leaves none behind."""
        loss.backward()
        assert self.input.grad is not None and self.weight.grad is not None
        found = loss.detach(), self.input.grad, self.weight.grad
        self.input.grad = self.weight.grad = None
        return found


def weighted_logprobs(o: Operands) -> Tensor:
    """A loss that weighs every row differently, as reinforcement learning does."""
    logp = vs.token_logprobs(o.input, o.weight, o.target)
    assert isinstance(logp, Tensor)
    return -(logp * o.upstream).sum()


def losses(o: Operands) -> dict[str, Callable[[], Any]]:
    """Forward and backward of each implementation."""
    runs = {
        "varstream": lambda: o.backward(vs.linear_cross_entropy(o.input, o.weight, o.target)),
        "varstream_logprobs": lambda: o.backward(weighted_logprobs(o)),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
        runs["torch_chunked"] = lambda: o.backward(
            F.linear_cross_entropy(o.input, o.weight, o.target, options=options)
        )
    return runs


def three_products(o: Operands, case: Case) -> Callable[[], None]:
    """x W^T, G W and G^T x over all rows into outputs that exist and have been written before."""
    x, weight = o.input.detach(), o.weight.detach()
    logits = torch.zeros(case.rows, case.classes)
    dinput, dweight = torch.zeros_like(x), torch.zeros_like(weight)

    def run() -> None:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=dinput)
        torch.mm(logits.t(), x, out=dweight)

    return run


def check(o: Operands, runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Largest relative error of loss, dX and dW against dense PyTorch; stops if it's too large."""
    logits = o.input @ o.weight.t()
    dense = o.backward(F.cross_entropy(logits, o.target))
    losses_ = F.cross_entropy(o.input @ o.weight.t(), o.target, reduction="none")
    weighted = o.backward((losses_ * o.upstream).sum())
    errors = {}
    for name, run in runs.items():
        expected = weighted if name == "varstream_logprobs" else dense
        pairs = zip(run(), expected, strict=True)
        errors[name] = max(relative_error(ours, theirs) for ours, theirs in pairs)
        if not errors[name] <= TOLERANCE:
            raise SystemExit(f"{name} is {errors[name]:.1e} off dense PyTorch: not timed")
    return errors


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Errors, memory and times of one case."""
    o = Operands(case)
    runs = losses(o)
    report: dict[str, Any] = {"shape": [case.rows, case.width, case.classes], "dtype": "float32"}
    report["relative_error"] = check(o, runs)
    gradients = o.input.nbytes + o.weight.nbytes
    logits = case.rows * case.classes * o.input.element_size()
    extra = {name: peak_memory(run) - gradients for name, run in runs.items()}
    report["bytes_beyond_gradients"] = extra
    report["memory_over_logits"] = {name: size / logits for name, size in extra.items()}
    runs["three_products"] = three_products(o, case)
    seconds = timing.paired(runs, rounds)
    report["seconds"] = {name: timing.summary(values) for name, values in seconds.items()}
    for key, base in (("over_three_products", "three_products"), ("over_torch", "torch_chunked")):
        if base in seconds:
            report[key] = {n: timing.ratio(seconds, n, base) for n in seconds if n != base}
    return report


def reached(report: dict[str, Any]) -> dict[str, float]:
    """The figures bars are set on; ratios count by their median."""
    ratios = ("over_three_products", "over_torch")
    found = {key: report[key]["varstream"]["median"] for key in ratios if key in report}
    return found | {"memory_over_logits": report["memory_over_logits"]["varstream"]}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--case", choices=[c.name for c in CASES], action="append")
    parser.add_argument("--no-store", action="store_true", help="only print")
    options = parser.parse_args()
    report: dict[str, Any] = {"environment": timing.environment(), "rounds": options.rounds}
    report["cases"] = {}
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        result = report["cases"][case.name] = measure(case, options.rounds)
        result["bars"] = timing.against(case.bars, reached(result))
        print(f"{case.name}: N={case.rows} d={case.width} V={case.classes}, float32")
        for name, times in result["seconds"].items():
            memory = result["memory_over_logits"].get(name)
            print(
                f"  {name:20} {times['median'] * 1e3:8.1f} ms "
                f"({times['quartile_1'] * 1e3:.1f} to {times['quartile_3'] * 1e3:.1f})"
                + (f", {memory:.1%} of the logits beyond dX and dW" if memory is not None else "")
            )
        timing.print_bars(result["bars"])
    report["environment"]["load_1_minute_after"] = timing.environment()["load_1_minute"]
    if not options.no_store:
        print(f"written: {timing.store('head', report)}")


if __name__ == "__main__":
    main()
