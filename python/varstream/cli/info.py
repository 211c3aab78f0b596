"""``varstream info``: what was built, what is here, what works."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import varstream
from varstream import _C
from varstream._load import NAMESPACE, composed_on_cuda

# About this release, whatever machine it is on; goes when its measurements are published.
GPU_STATUS = "CUDA kernels of this version: not yet measured on a GPU by the project."

# Packages that varstream works with but doesn't depend on: import name, name on PyPI, what for.
PACKAGES = (
    (
        "transformers",
        "transformers",
        "vs.stream, varstream verify and demo, planning from a config",
    ),
    ("tokenizers", "tokenizers", "varstream demo"),
    ("matplotlib", "matplotlib", "figures of varstream demo and of the benchmarks"),
    ("trl", "trl", "its trainers over a streamed model, on our log-probs (fused-head hook)"),
    ("liger_kernel", "liger-kernel", "a peer in the benchmarks; its signature works without it"),
    ("peft", "peft", "nothing yet: vs.stream refuses LoRA adapters by name"),
)
# What a user calls: the place that must exist (module or module:name), packages it needs.
FEATURES = (
    ("vs.pack, vs.varlen_attention, vs.merge_attention", "varstream:varlen_attention", ()),
    ("vs.linear_cross_entropy, vs.token_logprobs", "varstream:linear_cross_entropy", ()),
    ("varstream.objectives", "varstream.objectives", ()),
    ("vs.stream_layer", "varstream:stream_layer", ()),
    ("vs.stream, varstream verify", "varstream:stream", ("transformers",)),
    ("vs.padding_free", "varstream:padding_free", ("transformers",)),
    ("vs.plan_memory, varstream plan", "varstream:plan_memory", ()),
    ("varstream.batching", "varstream.batching", ()),
    ("varstream demo", "varstream.demo", ("transformers", "tokenizers", "matplotlib")),
    ("varstream.integrations.byte_transformer", "varstream.integrations.byte_transformer", ()),
    ("varstream.integrations.flash_attn", "varstream.integrations.flash_attn", ()),
    ("varstream.integrations.flash_attn_3", "varstream.integrations.flash_attn_3", ()),
    (
        'varstream.integrations.transformers (attn_implementation="varstream")',
        "varstream.integrations.transformers",
        ("transformers",),
    ),
    ("varstream.integrations.liger", "varstream.integrations.liger", ()),
    ("varstream.integrations.trl", "varstream.integrations.trl", ("trl",)),
)

app = typer.Typer(add_completion=False)


@app.command()
def info(
    json: bool = typer.Option(False, "--json", help="Print plain JSON instead of tables."),
) -> None:
    """Show versions, the build, devices and what works here."""
    show(as_json=json)


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
        "packages": _packages(),
        "features": _features(),
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


def _packages() -> dict[str, dict[str, str | None]]:
    """Version (None: missing) and use of each optional package; nothing is imported."""
    table: dict[str, dict[str, str | None]] = {}
    for module, name, use in PACKAGES:
        found = find_spec(module) is not None
        table[name] = {"version": _version(name) if found else None, "enables": use}
    return table


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # importable, but installed by no package manager
        return "unknown"


def _features(rows: Sequence[tuple[str, str, Sequence[str]]] = FEATURES) -> dict[str, str]:
    """What a user calls, and whether it works here."""
    return {name: _state(place, needs) for name, place, needs in rows}


def _state(place: str, needs: Sequence[str]) -> str:
    if not _exists(place):
        return "not in this version"
    missing = [name for name in needs if find_spec(name) is None]
    return f"needs: pip install {' '.join(missing)}" if missing else "works"


def _exists(place: str) -> bool:
    module, _, name = place.partition(":")
    if name:
        return hasattr(varstream, name)
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it would be in
        return False


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
    console = Console()
    for table in _tables(report):
        console.print(table)
    console.print("kernel: compiled for the GPU; ATen: composed from torch's own; -: none yet")
    console.print(_summary(report["cuda"]), style="bold")


def _tables(report: dict[str, Any]) -> list[Table]:
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

    packages = _table("optional packages", "package", "version", "enables")
    for name, package in report["packages"].items():
        version = package["version"] or f"missing: pip install {name}"
        packages.add_row(name, version, package["enables"])

    features = _table("what works here", "feature", "state")
    for name, state in report["features"].items():
        features.add_row(name, state)

    operators = _table("operators: what serves each device", "operator", "CPU", "CUDA")
    for name, served in report["operators"].items():
        operators.add_row(name, served["CPU"], served["CUDA"])
    return [table, packages, features, operators]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
