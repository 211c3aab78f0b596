"""A static model of the head on an H100 and an A100, from counted instructions and moved bytes:
nothing is measured. It fills the tables in bench/NOTES.md, where the assumptions stand."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LANES = 128  # of an SM, that issue in a cycle
MUFU_LANES = 16
PAUSE = 2e-6  # seconds in which a row's blocks move nothing
KINDS = ("fp32/bf16 plain", "bf16/bf16 plain", "fp32/bf16 modified", "bf16/bf16 modified")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SHAPES = ((8192, 4096, 128256), (8192, 2304, 256000))  # rows, hidden size, classes
RULE_SHAPES = (
    *SHAPES,
    (2048, 4096, 128256),
    (16384, 4096, 128256),
    (8192, 2048, 151936),
    (8192, 4096, 32000),
)
WEIGHT_BYTES = 6  # a weight: dW read in float32, scaled, written rounded

Row = dict[str, Any]
Table = list[list[str]]


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz, under load
    copy: float  # bytes a second that a copy of device memory moves

    def per_value(self, lanes: int, moved: float) -> float:
        """Results of `lanes` lanes an SM while `moved` bytes pass."""
        return self.multiprocessors * lanes * self.clock * moved / self.copy


H100 = Gpu("H100", "sm_90", 132, 1.755e9, 3.0e12)
A100 = Gpu("A100", "sm_80", 108, 1.41e9, 1.75e12)


# --- the row kernel -------------------------------------------------------------------------------


def per_value(row: Row, own: Row, kept: bool, kind: str = "mix") -> tuple[float, float]:
    """Issue slots and MUFU instructions a value, sums and one gradient; kind "all": both arms of
    every branch."""
    sums, *gradients = row["sass"]["passes"]
    [gradient] = [p for p in gradients if bool(p["LDGSTS"]) != kept]

    def of(one: Row, name: str) -> float:
        count = one["all"] if kind == "all" else one["mix"][name]
        return float(count) / (one["words"] * own["values"])

    return of(sums, "all") + of(gradient, "all"), of(sums, "MUFU") + of(gradient, "MUFU")


@dataclass(frozen=True)
class Estimate:
    moved: int  # bytes a value, reads and writes
    ideal: int  # the same of one read and one write
    slots: float
    slots_allowed: float  # that the copy's speed leaves time for
    mufu: float
    mufu_allowed: float
    low: float  # part of the copy's speed, if no other block fills a row's pauses
    high: float  # if others fill them all


def estimate(gpu: Gpu, row: Row, own: Row, classes: int) -> Estimate:
    place = row["residency"][str(classes)][gpu.arch]
    read, write = 16 // own["values"], own["gradient_bytes"] // own["values"]
    moved = read * (1 if place["kept"] else 2) + write
    slots, mufu = per_value(row, own, place["kept"])
    allowed = gpu.per_value(LANES, moved), gpu.per_value(MUFU_LANES, moved)
    high = min(1.0, allowed[0] / slots, allowed[1] / mufu)
    # All of an SM's blocks at work on their parts of rows, then all in their pause.
    values = classes / place["cluster"] * place["blocks_per_sm"]
    busy = values * moved * gpu.multiprocessors / gpu.copy
    low = busy / (busy / high + PAUSE * (1 if place["kept"] else 2))
    return Estimate(moved, read + write, slots, allowed[0], mufu, allowed[1], low, high)


def by_kernel(table: list[Row], gpu: Gpu) -> dict[str, Row]:
    return {row["kernel"]: row for row in table if row["arch"] == gpu.arch}


def row_table(table: list[Row], traits: dict[str, Row], gpu: Gpu) -> Table:
    rows = by_kernel(table, gpu)
    found: Table = []
    for kind in KINDS:
        name = f"head_softmax {kind}"
        for classes in map(int, rows[name]["residency"]):
            place = rows[name]["residency"][str(classes)][gpu.arch]
            e = estimate(gpu, rows[name], traits[name], classes)
            held = (
                f"{place['cluster']} x {place['dynamic_shared'] >> 10} KB"
                if place["kept"]
                else "read twice"
            )
            found.append(
                [
                    kind,
                    str(classes),
                    held,
                    str(place["blocks_per_sm"]),
                    f"{e.moved} ({e.moved / e.ideal:.2f})",
                    f"{e.slots:.1f} of {e.slots_allowed:.0f}",
                    f"{e.mufu:.1f} of {e.mufu_allowed:.1f}",
                    f"{e.low:.0%} to {e.high:.0%}",
                ]
            )
    head = ["values/gradient", "classes", "a row is held in", "blocks per SM"]
    head += ["bytes a value", "issue slots a value", "MUFU a value", "of the copy's speed"]
    return [head, *found]


def option_table(table: list[Row], traits: dict[str, Row]) -> Table:
    """What options cost: every option off, and both arms of every branch of the loops."""
    found: Table = [["kernel", "issue slots a value", "with every branch", "of (H100)"]]
    for name, row in by_kernel(table, H100).items():
        own = traits.get(name, {})
        if "residency" not in own:
            continue
        write = own["gradient_bytes"] // own["values"]
        moved = own["abreast"] * 16 // own["values"] + write
        if own["abreast"] == 2:
            slots, every = pair_slots(row, own, "mix"), pair_slots(row, own, "all")
        else:
            slots, every = (per_value(row, own, True, kind)[0] for kind in ("mix", "all"))
        found.append([name, f"{slots:.1f}", f"{every:.1f}", f"{H100.per_value(LANES, moved):.0f}"])
    return found


def pair_slots(row: Row, own: Row, kind: str) -> float:
    """Issue slots of a pair of values: sums, divergence and, with a mixture, gradient."""
    parts = [p for p in row["sass"]["passes"] if not p["STG"] or not p["LDGSTS"]]
    return sum(
        (p["all"] if kind == "all" else p["mix"]["all"]) * 2 / (p["words"] * own["values"])
        for p in parts
    )


# --- chunks and a call ----------------------------------------------------------------------------


def chunk_rule() -> Any:
    """The library's module, which imports nothing."""
    path = ROOT / "python/varstream/cross_entropy/chunk_rule.py"
    spec = importlib.util.spec_from_file_location("chunk_rule", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shape_name(shape: tuple[int, int, int]) -> str:
    return " x ".join(map(str, shape))


def products_ms(shape: tuple[int, int, int], dtype: str | None) -> float:
    """The three products: in the rule's chunks with logits of a dtype, or all rows at once."""
    rule, (rows, width, classes) = chunk_rule(), shape
    itemsize = BYTES[dtype or "bf16"]
    chunk = rule.chunk_rows(rows, width, classes, itemsize) if dtype else rows
    return 1e3 * float(rule.call_seconds(rows, chunk, width, classes, itemsize))


def rule_table() -> Table:
    rule = chunk_rule()
    found: Table = [
        ["N x d x V", "logits", "rows of a chunk", "chunks", "buffer", "three products", "at once"]
    ]
    for shape in RULE_SHAPES:
        rows, width, classes = shape
        for dtype in ("fp32", "bf16"):
            chunk = rule.chunk_rows(rows, width, classes, BYTES[dtype])
            pieces = -(-rows // chunk)
            largest = -(-rows // pieces)
            found.append(
                [
                    shape_name(shape),
                    dtype,
                    str(largest),
                    str(pieces),
                    f"{largest * classes * BYTES[dtype] / 2**20:.0f} MiB",
                    f"{products_ms(shape, dtype):.2f} ms",
                    f"{products_ms(shape, None):.2f} ms",
                ]
            )
    return found


def call_table(table: list[Row], traits: dict[str, Row]) -> Table:
    """Forward and backward against the three products of all rows at once."""
    rows_of = by_kernel(table, H100)
    found: Table = [
        [
            "N x d x V",
            "logits",
            "products",
            "row kernel",
            "dW's last pass",
            "others",
            "ratio",
        ]
    ]
    for shape in SHAPES:
        rows, width, classes = shape
        for dtype in ("fp32", "bf16"):
            name = f"head_softmax {dtype}/bf16 plain"
            e = estimate(H100, rows_of[name], traits[name], classes)
            products, alone = products_ms(shape, dtype), products_ms(shape, None)
            kernel = [1e3 * rows * classes * e.moved / H100.copy / part for part in (e.high, e.low)]
            last = 1e3 * WEIGHT_BYTES * width * classes / H100.copy
            # x gathered, dX written, put in its rows and scaled: 14 bytes a value.
            others = 1e3 * 14 * rows * width / H100.copy
            ratios = [(products + k + last + others) / alone for k in kernel]
            found.append(
                [
                    shape_name(shape),
                    dtype,
                    f"{products:.2f} of {alone:.2f} ms",
                    f"{kernel[0]:.2f} to {kernel[1]:.2f} ms",
                    f"{last:.2f} ms",
                    f"{others:.2f} ms",
                    f"{ratios[0]:.3f} to {ratios[1]:.3f}",
                ]
            )
    return found


# --- sections -------------------------------------------------------------------------------------


def lines_of(table: Table) -> list[str]:
    head, *rows = table
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def sections(table: list[Row], traits: dict[str, Row]) -> dict[str, list[str]]:
    """The lines of each section of bench/NOTES.md."""
    rows = []
    for gpu in (H100, A100):
        rows += [f"{gpu.name}:", "", *lines_of(row_table(table, traits, gpu)), ""]
    return {
        "head rows": rows[:-1],
        "head options": lines_of(option_table(table, traits)),
        "head chunks": lines_of(rule_table()),
        "head calls": lines_of(call_table(table, traits)),
    }
