"""Benchmark of packed attention on the CPU: ``python -m bench.attention``.

Forward and backward over ragged sequences against what PyTorch offers: SDPA over the padded
batch with a mask, and a loop of SDPA calls over the sequences (packed inputs split, outputs
concatenated). Results are compared with the loop before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import varstream as vs
from bench import timing
from varstream.testing import relative_error

TOLERANCE = 1e-5  # float32 against float32


@dataclass(frozen=True)
class Case:
    """B sequences of up to S tokens, lengths uniform in ``fill`` times S."""

    name: str
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool
    fill: tuple[float, float] = (0.2, 1.0)
    bars: tuple[tuple[str, float], ...] = ()

    def lengths(self) -> list[int]:
        low, high = self.fill
        draw = torch.rand(self.batch, generator=torch.Generator().manual_seed(0))
        return [max(1, int((low + (high - low) * u) * self.seqlen)) for u in draw.tolist()]


BARS = (("over_padded", 0.5), ("over_loop", 1.10))
CASES = [
    Case("main", 16, 512, 8, 64, causal=False, bars=BARS),
    Case("main_causal", 16, 512, 8, 64, causal=True, bars=BARS),
    Case("many_tiny", 256, 64, 8, 64, causal=True),
    Case("one_long", 1, 4096, 8, 64, causal=True, fill=(1.0, 1.0)),
]


class Operands:
    """Packed q, k, v (total, H, D) and the same rows in a padded batch (B, H, S, D)."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.lengths, self.causal = case.lengths(), case.causal
        self.cu = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        shape = (sum(self.lengths), case.heads, case.head_dim)
        self.packed = [torch.randn(shape).requires_grad_() for _ in range(3)]
        self.dout = torch.randn(shape)
        real = torch.arange(case.seqlen)[None] < torch.tensor(self.lengths)[:, None]  # (B, S)
        padded = torch.zeros(case.batch, case.seqlen, case.heads, case.head_dim)

        def pad(t: Tensor) -> Tensor:
            return padded.masked_scatter(real[..., None, None], t.detach()).transpose(1, 2)

        self.padded = [pad(t).contiguous().requires_grad_() for t in self.packed]
        self.padded_dout = pad(self.dout).contiguous()
        mask = real[:, None, None, :].expand(-1, 1, case.seqlen, -1)
        if case.causal:
            mask = mask & torch.ones(case.seqlen, case.seqlen, dtype=torch.bool).tril()
        self.mask = mask.contiguous()


def varstream(o: Operands) -> tuple[Tensor, ...]:
    """out (total, H, D) and dq, dk, dv."""
    out = vs.varlen_attention(*o.packed, o.cu, causal=o.causal)
    assert isinstance(out, Tensor)
    return out, *torch.autograd.grad(out, o.packed, o.dout)


def loop(o: Operands) -> tuple[Tensor, ...]:
    """SDPA on one sequence after the other."""
    outs = [
        sdpa(*(t.transpose(0, 1)[None] for t in part), is_causal=o.causal)[0].transpose(0, 1)
        for part in zip(*(t.split(o.lengths) for t in o.packed), strict=True)
    ]
    out = torch.cat(outs)
    return out, *torch.autograd.grad(out, o.packed, o.dout)


def padded(o: Operands) -> tuple[Tensor, ...]:
    """SDPA on the padded batch with a mask."""
    out = sdpa(*o.padded, attn_mask=o.mask)
    return out, *torch.autograd.grad(out, o.padded, o.padded_dout)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Error, times and ratios of one case."""
    o = Operands(case)
    error = max(relative_error(a, b) for a, b in zip(varstream(o), loop(o), strict=True))
    if not error <= TOLERANCE:
        raise SystemExit(f"{case.name}: varstream is {error:.1e} off the loop: not timed")
    runs: dict[str, Callable[[], Any]] = {
        "varstream": lambda: varstream(o),
        "loop": lambda: loop(o),
        "padded": lambda: padded(o),
    }
    seconds = timing.paired(runs, rounds)
    report: dict[str, Any] = {
        "shape": [case.batch, case.seqlen, case.heads, case.head_dim],
        "causal": case.causal,
        "dtype": "float32",
        "fill": sum(o.lengths) / (case.batch * case.seqlen),
        "relative_error": error,
        "seconds": {name: timing.summary(values) for name, values in seconds.items()},
    }
    for base in ("padded", "loop"):
        report[f"over_{base}"] = timing.ratio(seconds, "varstream", base)
    reached = {f"over_{base}": report[f"over_{base}"]["median"] for base in ("padded", "loop")}
    report["bars"] = timing.against(case.bars, reached)
    return report


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
        times = ", ".join(f"{n} {t['median'] * 1e3:.1f} ms" for n, t in result["seconds"].items())
        print(f"{case.name} (fill {result['fill']:.0%}): {times}")
        for key in ("over_padded", "over_loop"):
            if key not in result["bars"]:
                print(f"  {key}: {result[key]['median']:.3f}")
        timing.print_bars(result["bars"])
    report["environment"]["load_1_minute_after"] = timing.environment()["load_1_minute"]
    if not options.no_store:
        print(f"written: {timing.store('attention', report)}")


if __name__ == "__main__":
    main()
