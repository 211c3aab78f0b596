"""A static model of the passes over rows on an H100 and an A100, from counted instructions and
bytes: nothing is measured. It fills a table in bench/NOTES.md, where the assumptions stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernel_head_model import A100, H100, Gpu, by_kernel, lines_of

LATENCY = 0.8e-6  # seconds from asking device memory for a word to having it
LANES = 32
Row = dict[str, Any]


@dataclass(frozen=True)
class Pass:
    """What a warp does at once, apart from what its machine code says."""

    kernel: str
    name: str
    read: int  # bytes
    written: int
    waits: int  # loads that follow one another
    loads: int = 0  # whose bytes these are, where a round of the loop has more of them


def prepare(value_dim: int) -> Pass:
    """8 values a lane, in rows of 8, 16 or 32 lanes; lse is read and two numbers are written."""
    rows = LANES // max(8, 1 << (value_dim // 8 - 1).bit_length())
    name = f"attention_backward_prepare, values of {value_dim}"
    return Pass("attention_backward_prepare bf16", name, rows * (4 * value_dim + 4), rows * 8, 1)


def copy(kernel: str, word: int) -> Pass:
    """Four words a lane; a row's index comes before its words."""
    return Pass(f"{kernel} {word}-byte", f"{kernel}, words of {word}", 128 * word, 128 * word, 2, 4)


PASSES = (
    prepare(64),
    prepare(128),
    prepare(256),
    Pass("attention_backward_round bf16", "attention_backward_round", 32 * LANES, 16 * LANES, 1),
    *(copy(kernel, word) for kernel in ("gather_rows", "scatter_rows") for word in (16, 8, 4, 2)),
)


@dataclass(frozen=True)
class Estimate:
    instructions: float  # of a warp for these bytes
    threads: int  # on an SM
    under_way: float  # bytes asked for and not there yet, of an SM
    needed: float  # of them, for the copy's speed
    slots: float  # of the issue slots that the copy's speed leaves
    share: float  # of the copy's speed


def estimate(gpu: Gpu, row: Row, one: Pass) -> Estimate:
    threads = row["blocks_per_sm"][gpu.arch] * row["threads"]
    moved, whole = one.read + one.written, row["sass"]["round"]
    instructions = whole["all"] * (one.loads / sum(whole["LDG"].values()) if one.loads else 1)
    # An SM starts 4 instructions of warps a cycle.
    allowed = gpu.multiprocessors * 4 * gpu.clock * moved / gpu.copy
    slots = instructions / allowed
    # While a warp waits, what it reads is under way, and as many bytes again as it writes.
    under_way = threads / LANES * moved / one.waits
    needed = gpu.copy / gpu.multiprocessors * LATENCY
    share = min(1.0, under_way / needed, 1 / slots)
    return Estimate(instructions, threads, under_way, needed, slots, share)


def lines(table: list[Row]) -> list[str]:
    found: list[str] = []
    head = ["kernel", "instructions a warp", "bytes a warp", "threads an SM"]
    head += ["KB under way of needed", "issue slots", "of the copy's speed"]
    for gpu in (H100, A100):
        rows, cells = by_kernel(table, gpu), [head]
        for one in PASSES:
            e = estimate(gpu, rows[one.kernel], one)
            cells.append(
                [
                    one.name,
                    f"{e.instructions:.0f}",
                    f"{one.read} + {one.written}",
                    str(e.threads),
                    f"{e.under_way / 1024:.0f} of {e.needed / 1024:.0f}",
                    f"{e.slots:.0%}",
                    f"{e.share:.0%}",
                ]
            )
        found += [f"{gpu.name}:", "", *lines_of(cells), ""]
    return found[:-1]
