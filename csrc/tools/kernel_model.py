"""A static model of attention on an A100 and an H100, from counted instructions: nothing is
measured. It fills the tables in bench/NOTES.md, where the assumptions stand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kernel_head_model
import kernel_pass_model

NOTES = Path(__file__).resolve().parents[2] / "bench/NOTES.md"
END = "<!-- end -->"
UNITS = ("tensor", "issue", "fma", "alu", "mufu", "shared")
MUFU, LANES_16, LANES_32 = 8, 2, 1  # cycles of a quarter SM, an instruction of a warp
# The SM's shared memory moves 128 bytes a cycle, and its four quarters take turns.
SHARED_16_BYTES, SHARED_4_BYTES = 16, 4
# Sectors of 32 bytes that an addition to dQ touches: lanes hold 8 rows, or 16 with four values.
SECTORS = {"sm_80": 8, "sm_90": 16}


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    multiprocessors: int
    peak: int  # dense TFLOP/s, data sheet
    peak_hmma: float  # cycles of an HMMA.16816 at that rate
    hmma: float  # and as mma.sync
    fp32: int  # cycles of an FFMA


A100 = Gpu("A100", "sm_80", 108, 312, 8, 8, LANES_16)
H100 = Gpu("H100", "sm_90", 132, 989, 4, 4 / 0.63, LANES_32)
HEAD_DIMS = ("32/32", "64/64", "96/96", "128/128", "192/128", "192/192", "256/256")
KINDS = [f"bf16 {dims} {kind}" for dims in HEAD_DIMS for kind in ("plain", "modified")]
TABLES = ("forward", "backward", "backward_query")
SECTIONS = (*TABLES, "row passes", "head rows", "head options", "head chunks", "head calls")


def begin(name: str) -> str:
    return f"<!-- {name}, written by csrc/tools/kernel_report.py -->"


def cycles(gpu: Gpu, sass: dict[str, Any]) -> dict[str, float]:
    """Cycles that a warp's tile keeps each unit of its quarter of the SM busy."""
    mix = dict(sass["tile"])
    floats = sum(mix[name] for name in ("FFMA", "FMUL", "FADD"))
    shared = {name: SHARED_16_BYTES * mix[name] for name in ("LDSM", "LDGSTS")}
    shared |= {name: SHARED_4_BYTES * mix[name] for name in ("LDS", "STS", "SHFL", "RED")}
    apart = ("HMMA", "MUFU", "FFMA", "FMUL", "FADD", "IMAD", *shared)
    return {
        "tensor": gpu.hmma * mix["HMMA"],
        "issue": mix["all"],
        "fma": gpu.fp32 * floats + LANES_16 * mix["IMAD"],
        "alu": LANES_16 * (mix["all"] - sum(mix[name] for name in apart)),
        "mufu": MUFU * mix["MUFU"],
        "shared": sum(shared.values()),
    }


def share(gpu: Gpu, busy: dict[str, float], hmma: int) -> tuple[float, float]:
    """The part of the tensor peak if other work never overlaps tensor work, and if all does."""
    peak, tensor = gpu.peak_hmma * hmma, busy["tensor"]
    others = max(busy["issue"] - hmma, *(busy[x] for x in ("fma", "alu", "mufu")))
    return peak / (max(tensor, busy["shared"]) + others), peak / max(busy.values())


def cells(gpu: Gpu, row: dict[str, Any]) -> dict[str, str]:
    """One row of a table, by column."""
    busy, (rows, keys) = cycles(gpu, row["sass"]), row["tile"]
    _, _, dims, kind = row["kernel"].split()
    backward = row["kernel"].startswith("attention_backward ")
    walked = rows if backward else keys  # a block walks tiles of Q and dO, or of K and V
    blocks, warps = row["blocks_per_sm"][gpu.arch], row["threads"] // 32
    low, high = share(gpu, busy, row["sass"]["tile"]["HMMA"])
    # While each quarter of the SM works off a tile of every block.
    tile_bytes = 2 * walked * sum(map(int, dims.split("/")))
    rate = tile_bytes / (busy["tensor"] * warps / 4)
    found = {
        "head dims": f"{dims} {kind}",
        "tile": f"{rows} x {keys}",
        "registers": f"{row['registers']}",
        "blocks per SM": f"{blocks} ({blocks * warps} warps)",
        "LDSM to HMMA": f"{row['sass']['LDSM']} to {row['sass']['HMMA']}",
        f"{'Q and dO' if backward else 'K and V'} a tile, a cycle of tensor work": (
            f"{tile_bytes >> 10} KB, {rate:.0f} B"
        ),
        **{unit: f"{busy[unit]:.0f}" for unit in UNITS},
    }
    if backward:
        sectors = (
            4
            * SECTORS[gpu.arch]
            * row["sass"]["loop"]["RED"]
            / busy["tensor"]
            * gpu.multiprocessors
        )
        found["sectors of dQ"] = f"{sectors:.0f}"
    found["of the tensor peak"] = f"{low:.0%} to {high:.0%}"
    if not row["kernel"].startswith("attention_backward_query"):  # it makes products once more
        found["TFLOP/s"] = f"{low * gpu.peak:.0f} to {high * gpu.peak:.0f}"
    return found


def table_lines(name: str, gpu: Gpu, table: list[dict[str, Any]]) -> list[str]:
    rows = {row["kernel"]: row for row in table if row["arch"] == gpu.arch}
    found = [cells(gpu, rows[f"attention_{name} {kind}"]) for kind in KINDS]
    lines = [list(found[0]), ["---"] * len(found[0]), *(list(row.values()) for row in found)]
    return [f"{gpu.name}:", "", *("| " + " | ".join(line) + " |" for line in lines), ""]


def section(name: str, table: list[dict[str, Any]], traits: dict[str, dict[str, Any]]) -> str:
    """A section of bench/NOTES.md, from the rows of budgets.json and the kernels' constants."""
    if name in TABLES:
        lines = [line for gpu in (A100, H100) for line in table_lines(name, gpu, table)][:-1]
    elif name == "row passes":
        lines = kernel_pass_model.lines(table)
    else:
        lines = kernel_head_model.sections(table, traits)[name]
    return "\n".join([begin(name), *lines, END])


def written_section(name: str) -> str:
    text = NOTES.read_text()
    start = text.index(begin(name))
    return text[start : text.index(END, start) + len(END)]


def write_sections(table: list[dict[str, Any]], traits: dict[str, dict[str, Any]]) -> None:
    for name in SECTIONS:
        found = section(name, table, traits)
        NOTES.write_text(NOTES.read_text().replace(written_section(name), found))
