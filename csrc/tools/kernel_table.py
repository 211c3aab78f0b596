"""The table of budgets: rows from what the compiler said, the bars they must reach, differences."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_build import Compiled

TABLE = Path(__file__).resolve().parent / "budgets.json"
Row = dict[str, Any]
Key = tuple[str, str]  # kernel and architecture


# --- occupancy ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one SM: CUDA C++ Programming Guide, technical specifications by capability."""

    threads: int
    blocks: int
    shared: int  # bytes of all blocks
    block_shared: int  # bytes of one block, after asking for them
    registers: int = 65536

    def blocks_of(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that run on it at once, for registers a thread and shared bytes a block."""
        if shared > self.block_shared:
            return 0
        warps = -(-threads // 32)
        # A warp's registers come in units of 256 from its quarter of the register file.
        warp_registers = -(-registers * 32 // 256) * 256
        by_registers = 4 * (self.registers // 4 // warp_registers) // warps
        # Each block takes 1 KB for the system and units of 128 bytes.
        by_shared = self.shared // (-(-shared // 128) * 128 + 1024)
        return min(self.blocks, self.threads // (32 * warps), by_registers, by_shared)


DEVICES = {
    "sm_80": Multiprocessor(2048, 32, 164 << 10, 163 << 10),
    "sm_86": Multiprocessor(1536, 16, 100 << 10, 99 << 10),
    "sm_89": Multiprocessor(1536, 24, 100 << 10, 99 << 10),
    "sm_90": Multiprocessor(2048, 32, 228 << 10, 227 << 10),
}
RUNS_ON = {"sm_80": ("sm_80", "sm_86", "sm_89"), "sm_90": ("sm_90",)}


# --- rows -----------------------------------------------------------------------------------------


def kernel_name(mangled: str) -> tuple[str, str, str]:
    """Kernel, element or word, and traits' key of an entry point's mangled name."""
    dtypes = {"13__nv_bfloat16": "bf16", "6__half": "fp16"}
    found = re.search(
        r"attention7ForwardI\w*?13ForwardTraitsI(13__nv_bfloat16|6__half)Li(\d+)ELi(\d+)ELb([01])E",
        mangled,
    )
    if found:
        dims = f"{found[2]}/{found[3]} {'modified' if found[4] == '1' else 'plain'}"
        return "attention_forward", dtypes[found[1]], dims
    found = re.search(r"14row_copy_entryIL\w*?7RowCopyE([01])ELi(\d+)E", mangled)
    if found:
        return ("gather_rows", "scatter_rows")[int(found[1])], f"{found[2]}-byte", "rows"
    if "12TileSchedule" in mangled:
        return "tile_schedule", "", "tile_schedule"
    raise ValueError(f"kernel_table.py doesn't know the kernel {mangled}")


def traits_key(constants: dict[str, Any]) -> str:
    if constants["kernel"] != "attention_forward":
        return str(constants["kernel"])
    modified = "modified" if constants["modified"] else "plain"
    return f"{constants['dim']}/{constants['value_dim']} {modified}"


def ptxas_reports(text: str) -> dict[str, dict[str, int]]:
    """What ``ptxas -v`` printed, by mangled name."""
    parts = re.split(r"Compiling entry function '(\w+)' for '\w+'\n", text)
    reports = {}
    for name, report in zip(parts[1::2], parts[2::2], strict=True):

        def number(pattern: str, default: int | None = None, report: str = report) -> int:
            found = re.search(pattern, report)
            if found is None and default is None:
                raise ValueError(f"no {pattern} in what ptxas printed:\n{report}")
            return int(found[1]) if found else int(default or 0)

        reports[name] = {
            "registers": number(r"Used (\d+) registers"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spill_stores": number(r"(\d+) bytes spill stores"),
            "spill_loads": number(r"(\d+) bytes spill loads"),
            "static_shared": number(r"(\d+) bytes smem", 0),
            "barriers": number(r"used (\d+) barriers", 0),
        }
    return reports


def rows_of(compiled: list[Compiled], traits: list[dict[str, Any]]) -> list[Row]:
    """One row a kernel and architecture, sorted."""
    constants = {traits_key(t): t for t in traits}
    rows = []
    for unit in compiled:
        for mangled, report in ptxas_reports(unit.ptxas).items():
            kernel, kind, key = kernel_name(mangled)
            own = constants[key]
            shared = report["static_shared"] + own["dynamic_shared"]
            dims = key if kernel == "attention_forward" else ""
            row: Row = {
                "kernel": " ".join(filter(None, (kernel, kind, dims))),
                "arch": unit.arch,
                "threads": own["threads"],
                **report,
                "dynamic_shared": own["dynamic_shared"],
                "blocks_per_sm": {
                    name: DEVICES[name].blocks_of(own["threads"], report["registers"], shared)
                    for name in RUNS_ON[unit.arch]
                },
            }
            if "rows" in own:
                row["tile"] = [own["rows"], own["keys"]]
            if unit.sass is not None:
                row["sass"] = unit.sass[mangled]
            rows.append(row)
    return sorted(rows, key=lambda row: (row["arch"], natural(row["kernel"])))


def natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def key_of(row: Row) -> Key:
    return row["kernel"], row["arch"]


# --- bars -----------------------------------------------------------------------------------------


def forward_ideal(own: dict[str, Any]) -> dict[str, int]:
    """Instructions a thread of attention forward issues for one tile of keys, and for Q."""
    tiles, keys, rows = own["warp_tiles"], own["keys"], own["rows"]
    steps = own["dim"] // 16
    copies = rows * own["dim"] + keys * (2 * own["dim"] + own["value_dim"])  # K before and in it
    return {
        # Fragments are loaded once a step: those of Q and K, those of V; each used on all rows.
        "LDSM": steps * (tiles + keys // 16) + keys // 16 * own["value_dim"] // 16,
        "HMMA": steps * tiles * keys // 8 + keys // 16 * tiles * own["value_dim"] // 8,
        "LDGSTS": copies * 2 // 16 // own["threads"],
        "STG128": rows * own["value_dim"] * 2 // 16 // own["threads"],
        "STG32": 2 * tiles,  # LSE
    }


def violations(row: Row, own: dict[str, Any]) -> list[str]:
    """The bars that a row misses, whatever the compiler."""
    missed = [f"{n} is {row[n]}" for n in ("stack", "spill_stores", "spill_loads") if row[n] != 0]
    missed += [f"doesn't run on {d}" for d, blocks in row["blocks_per_sm"].items() if blocks < 1]
    sass = row.get("sass")
    if sass is None:
        return missed

    def bar(name: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            missed.append(f"{name}: {found}, not {wanted}")

    bar("loads and stores of local memory", sass["local"], 0)
    bar("loads and stores of unknown memory", sass["untyped"], 0)
    if own["kernel"] == "attention_forward":
        ideal = forward_ideal(own)
        for name in ("LDSM", "HMMA"):
            bar(name, sass[name], ideal[name])
            bar(f"{name} in the loop", sass.get("loop", {}).get(name), ideal[name])
        bar("LDGSTS by width", sass["LDGSTS"], {"128": ideal["LDGSTS"]})
        bar("STG by width", sass["STG"], {"128": ideal["STG128"], "32": ideal["STG32"]})
        bar("LDG wider than a scalar", sass["LDG"].get("128", 0), 0)
        # A slope a row; seed and offset.
        scalars = 2 * own["warp_tiles"] + 3 if own["modified"] else 0
        if sass.get("loop", {}).get("LDG", 0) > scalars:
            missed.append(f"LDG in the loop: {sass['loop']['LDG']}, over {scalars}")
    elif "16-byte" in row["kernel"]:
        bar("LDG narrower than 16 bytes, but for the index", sass["LDG"].keys(), {"64", "128"})
        bar("STG by width", set(sass["STG"]), {"128"})
    return missed


# --- the committed table --------------------------------------------------------------------------


def read_table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def table_text(rows: list[Row], nvcc: str, nvdisasm: str | None) -> str:
    """JSON, a line a row."""
    head = {"nvcc": nvcc, "nvdisasm": nvdisasm}
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    return json.dumps(head, indent=2)[:-2] + f',\n  "kernels": [\n    {lines}\n  ]\n}}\n'


def flat(row: Row, prefix: str = "") -> Row:
    """Nested values under names with dots."""
    values: Row = {}
    for name, value in row.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
        values |= inner or {prefix + name: value}
    return values


def differences(committed: Row, found: Row, same_compiler: bool) -> list[str]:
    """Where a row is not what the table says.

    Another nvcc may allocate registers and order instructions in another way; it may not fit fewer
    blocks on an SM. Counts of instructions are compared where both rows have them.
    """
    if not same_compiler:
        names = ["threads", "dynamic_shared", "static_shared", "tile"]
        fewer = [
            f"{blocks} blocks on {device}, not {committed['blocks_per_sm'].get(device)}"
            for device, blocks in found["blocks_per_sm"].items()
            if blocks < committed["blocks_per_sm"].get(device, 0)
        ]
    else:
        fewer = []
        if "sass" not in found:  # without nvdisasm
            committed = {name: value for name, value in committed.items() if name != "sass"}
        committed, found = flat(committed), flat(found)
        names = sorted(committed.keys() | found.keys())
    return fewer + [
        f"{name} is {found.get(name)}, not {committed.get(name)}"
        for name in names
        if committed.get(name) != found.get(name)
    ]
