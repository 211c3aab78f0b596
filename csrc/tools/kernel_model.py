"""A static model of attention forward on an A100, from counted instructions: nothing is measured.

It fills the table in bench/NOTES.md, where the assumptions stand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NOTES = Path(__file__).resolve().parents[2] / "bench/NOTES.md"
BEGIN, END = "<!-- written by csrc/tools/kernel_report.py -->", "<!-- end -->"
KERNELS = [f"attention_forward bf16 {d}/{d} {m}" for d in (64, 128) for m in ("plain", "modified")]
TENSOR, MUFU, LANES_16, SHARED = 8, 8, 2, 16  # cycles of a quarter SM, an instruction of a warp


def cycles(mix: dict[str, int]) -> dict[str, int]:
    """Cycles that a warp's tile keeps each unit of its quarter of the SM busy."""
    fma = sum(mix[name] for name in ("FFMA", "FMUL", "FADD", "IMAD"))
    apart = ("all", "HMMA", "LDSM", "LDGSTS", "MUFU", "SHFL", "FFMA", "FMUL", "FADD", "IMAD")
    logic = mix["all"] - sum(mix[name] for name in apart[1:])
    return {
        "tensor": TENSOR * mix["HMMA"],
        "issue": mix["all"],
        "fma": LANES_16 * fma,
        "alu": LANES_16 * logic,
        "mufu": MUFU * mix["MUFU"],
        # The SM's shared memory takes 4 cycles for 512 bytes; its four quarters take turns.
        "shared": SHARED * (mix["LDSM"] + mix["LDGSTS"]),
    }


def share(busy: dict[str, int]) -> tuple[float, float]:
    """The part of the tensor peak if softmax never overlaps tensor work, and if all does."""
    tensor = busy["tensor"]
    others = max(busy["issue"] - tensor // TENSOR, *(busy[x] for x in ("fma", "alu", "mufu")))
    return tensor / (tensor + others), tensor / max(busy.values())


def line(row: dict[str, Any]) -> str:
    busy, (rows, keys) = cycles(row["sass"]["tile"]), row["tile"]
    _, dtype, dims, kind = row["kernel"].split()
    dim, value_dim = map(int, dims.split("/"))
    blocks, warps = row["blocks_per_sm"]["sm_80"], row["threads"] // 32
    low, high = share(busy)
    # While each quarter of the SM works off a tile of every block.
    tile_bytes = 2 * keys * (dim + value_dim)
    rate = tile_bytes / (busy["tensor"] * warps / 4)
    cells = [
        f"{dims} {kind}",
        f"{rows} x {keys}",
        f"{blocks} ({blocks * warps} warps)",
        f"{tile_bytes >> 10} KB, {rate:.0f} B",
        *(f"{busy[unit]}" for unit in ("tensor", "issue", "fma", "alu", "mufu", "shared")),
        f"{low:.0%} to {high:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


def section(table: list[dict[str, Any]]) -> str:
    """The table of bench/NOTES.md, from the rows of budgets.json."""
    rows = {row["kernel"]: row for row in table if row["arch"] == "sm_80"}
    head = [
        "| head dims | tile | blocks per SM | K and V a tile, a cycle of tensor work | tensor "
        "| issue | fma | alu | mufu | shared | of the tensor peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([BEGIN, *head, *(line(rows[kernel]) for kernel in KERNELS), END])


def written_section() -> str:
    text = NOTES.read_text()
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def write_section(table: list[dict[str, Any]]) -> None:
    NOTES.write_text(NOTES.read_text().replace(written_section(), section(table)))
