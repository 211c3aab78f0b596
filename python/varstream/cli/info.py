"""``varstream info``: what was built, what is here, what works."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import varstream
from varstream import _C
from varstream._load import NAMESPACE, composed_on_cuda

# About this release, whatever machine it is on; goes when its measurements are published.
GPU_STATUS = "CUDA kernels of this version: not yet measured on a GPU by the project."


def collect() -> dict[str, Any]:
    """Everything ``varstream info`` shows, as plain data."""
    build = _C.build_info()
    return {
        "versions": {
            "varstream": varstream.__version__,
            "torch": torch.__version__,
            "torch built against": build["torch"],
            "Python": platform.python_version(),
            "nvcc": build["nvcc"] or None,
            "CUTLASS headers": build["cutlass"] or None,
            "compiler": build["compiler"],
        },
        "cuda": {
            "built": build["cuda"],
            "reason": build["cuda_reason"],
            "archs": [_arch_name(arch) for arch in build["cuda_archs"].split()],
            "kernels": build["kernels"],
            "symbols": _C.cuda_symbols(),
            "usable": build["cuda"] and torch.cuda.is_available(),
        },
        "devices": _devices(),
        "operators": _operators(),
    }


def _arch_name(arch: str) -> str:
    """CMake's spelling as people know it: 80-real is sm_80, 90-virtual is PTX for newer GPUs."""
    number, _, kind = arch.partition("-")
    names = {"real": f"sm_{number}", "virtual": f"PTX compute_{number}"}
    return names.get(kind, f"sm_{number} and its PTX" if number.isalnum() else arch)


def _devices() -> list[str]:
    devices = [f"CPU, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        devices.append(
            f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{memory:.0f} GiB"
        )
    return devices


def _operators() -> dict[str, dict[str, str]]:
    """Per operator, what serves CPU and CUDA tensors: a kernel, ATen calls, or nothing."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    prefix = f"{NAMESPACE}::"
    table = {}
    for full_name in sorted(torch._C._dispatch_get_all_op_names()):
        if not full_name.startswith(prefix):
            continue
        name = full_name.removeprefix(prefix)
        cuda = "-"
        if has_kernel(full_name, "CUDA"):
            cuda = "ATen" if name in composed_on_cuda else "kernel"
        table[name] = {"CPU": "ATen" if has_kernel(full_name, "CPU") else "-", "CUDA": cuda}
    return table


def _summary(cuda: dict[str, Any]) -> str:
    """What works here, in a sentence or two."""
    if not cuda["built"]:
        return f"Built CPU only: {cuda['reason']}. No CUDA kernel is in this build."
    if not cuda["usable"]:
        return (
            "CUDA kernels are built but can't run here: torch "
            + ("sees no CUDA device. " if torch.version.cuda else "is CPU only. ")
            + GPU_STATUS
        )
    missing = [name for name, found in cuda["symbols"].items() if not found]
    if missing:
        return f"CUDA kernels can't run: torch lacks {', '.join(missing)}."
    return GPU_STATUS


def show(as_json: bool) -> None:
    """Print the report."""
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    cuda = report["cuda"]
    table = Table(title="varstream", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, version in report["versions"].items():
        table.add_row(name, version or "none")
    table.add_section()
    table.add_row("CUDA build", f"yes, {cuda['reason']}" if cuda["built"] else "no, CPU only")
    table.add_row("architectures", ", ".join(cuda["archs"]) or "none")
    table.add_row("kernels", ", ".join(cuda["kernels"]) or "none")
    table.add_section()
    for device in report["devices"]:
        table.add_row("device", device)

    operators = Table(title="operators: what serves each device", title_justify="left")
    for column in ("operator", "CPU", "CUDA"):
        operators.add_column(column)
    for name, served in report["operators"].items():
        operators.add_row(name, served["CPU"], served["CUDA"])

    console = Console()
    console.print(table)
    console.print(operators)
    console.print("kernel: compiled for the GPU; ATen: composed from torch's own; -: none yet")
    console.print(_summary(cuda), style="bold")
