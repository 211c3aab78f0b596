"""The table of budgets: rows from what the compiler said, differences from the committed ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kernel_build import Compiled
from kernel_devices import DEVICES, RUNS_ON

TABLE = Path(__file__).resolve().parent / "budgets.json"
Row = dict[str, Any]
Key = tuple[str, str]  # kernel and architecture


# --- devices --------------------------------------------------------------------------------------


def devices(arch: str, own: dict[str, Any]) -> list[str]:
    """Where the launch takes a kernel: the backward has large tiles where they fit, else small.

    Small tiles in sm_90's code are for newer GPUs, which build their own from its PTX.
    """
    if "small" not in own:
        return list(RUNS_ON[arch])
    fits = {name: own["large_shared"] <= DEVICES[name].block_shared for name in RUNS_ON[arch]}
    return [name for name, large in fits.items() if large != own["small"]]


# --- rows -----------------------------------------------------------------------------------------


DTYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32"}
ELEMENT = "|".join(DTYPES)
TILES = re.compile(
    r"attention\d+(Forward|BackwardQuery|Backward)I\w*?TraitsI(13__nv_bfloat16|6__half)"
    r"Li(\d+)ELi(\d+)ELb([01])E(?:Lb([01])E)?"
)
ATTENTION = {
    "Forward": "attention_forward",
    "Backward": "attention_backward",
    "BackwardQuery": "attention_backward_query",
    "BackwardPrepare": "attention_backward_prepare",
    "BackwardRound": "attention_backward_round",
}


def kernel_name(mangled: str) -> tuple[str, str, str]:
    """Kernel, element or word, and instance of an entry point's mangled name."""
    found = TILES.search(mangled)
    if found:
        modifiers = "modified" if found[5] == "1" else "plain"
        instance = f"{found[3]}/{found[4]} {modifiers}{' small' if found[6] == '1' else ''}"
        return ATTENTION[found[1]], DTYPES[found[2]], instance
    found = re.search(r"\d(BackwardPrepare|BackwardRound)I(13__nv_bfloat16|6__half)E", mangled)
    if found:
        return ATTENTION[found[1]], DTYPES[found[2]], ""
    found = re.search(r"14row_copy_entryIL\w*?7RowCopyE([01])ELi(\d+)E", mangled)
    if found:
        return ("gather_rows", "scatter_rows")[int(found[1])], f"{found[2]}-byte", ""
    if "13BackwardSinks" in mangled:
        return "attention_backward_sinks", "", ""
    found = re.search(rf"7SoftmaxI({ELEMENT})({ELEMENT}|S\d*_)Lb([01])E", mangled)
    if found:
        gradient = DTYPES[found[1 if found[2].startswith("S") else 2]]
        kind = "modified" if found[3] == "1" else "plain"
        return "head_softmax", "", f"{DTYPES[found[1]]}/{gradient} {kind}"
    found = re.search(rf"12DistillationI({ELEMENT})E", mangled)
    if found:
        return "head_distillation", "", f"fp32/{DTYPES[found[1]]}"
    if "12TileSchedule" in mangled:
        return "tile_schedule", "", ""
    raise ValueError(f"kernel_table.py doesn't know the kernel {mangled}")


def constants_of(kernel: str) -> str:
    """The traits_key of a row's kernel: its name without an element of its own."""
    name, *words = kernel.split()
    if name.endswith("_rows"):
        return "rows"
    return " ".join([name, *(word for word in words if word not in DTYPES.values())])


def traits_key(constants: dict[str, Any]) -> str:
    return " ".join(filter(None, (constants["kernel"], constants.get("instance"))))


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
            kernel = " ".join(filter(None, kernel_name(mangled)))
            own = constants[constants_of(kernel)]
            shared = report["static_shared"] + own["dynamic_shared"]
            row: Row = {
                "kernel": kernel,
                "arch": unit.arch,
                "threads": own["threads"],
                **report,
                "dynamic_shared": own["dynamic_shared"],
                "blocks_per_sm": {
                    name: DEVICES[name].blocks_of(own["threads"], report["registers"], shared)
                    for name in devices(unit.arch, own)
                },
            }
            if "rows" in own:
                row["tile"] = [own["rows"], own["keys"]]
            if "residency" in own:
                row["residency"] = residency(unit.arch, own, report)
            if unit.sass is not None:
                row["sass"] = unit.sass[mangled]
            rows.append(row)
    return sorted(rows, key=lambda row: (row["arch"], natural(row["kernel"])))


def residency(arch: str, own: Row, report: dict[str, int]) -> Row:
    """Where rows of the named vocabularies are held, by classes and device."""
    found: Row = {}
    for place in own["residency"]:
        device = place["device"]
        if device not in RUNS_ON[arch]:
            continue
        shared = report["static_shared"] + place["dynamic_shared"]
        blocks = DEVICES[device].blocks_of(own["threads"], report["registers"], shared)
        by_device = found.setdefault(str(place["classes"]), {})
        by_device[device] = {
            "cluster": place["cluster"],
            "kept": place["kept"],
            "dynamic_shared": place["dynamic_shared"],
            "blocks_per_sm": blocks,
        }
    return found


def natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def key_of(row: Row) -> Key:
    return row["kernel"], row["arch"]


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
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(i + 1): one for i, one in enumerate(value)}
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
