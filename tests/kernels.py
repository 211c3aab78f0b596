"""What csrc/tools finds out about the compiled kernels, once a test run."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "csrc/tools"
sys.path.insert(0, str(TOOLS))

import kernel_build  # noqa: E402
import kernel_table  # noqa: E402

Row = dict[str, Any]
COMMITTED: dict[tuple[str, str], Row] = {
    kernel_table.key_of(row): row for row in kernel_table.read_table()["kernels"]
}
KEYS = list(COMMITTED)
# What one template's constants make: all dtypes and architectures.
GROUPS: dict[str, list[tuple[str, str]]] = {}
for _key in KEYS:
    GROUPS.setdefault(kernel_table.constants_of(_key[0]), []).append(_key)


@functools.cache
def report() -> dict[str, Any]:
    """All kernels compiled, by a process of its own: its compilers' memory is then theirs alone."""
    command = [sys.executable, TOOLS / "kernel_report.py", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@functools.cache
def rows() -> dict[tuple[str, str], Row]:
    if kernel_build.nvcc() is None:
        pytest.skip("needs nvcc")
    return {kernel_table.key_of(row): row for row in report()["kernels"]}


@functools.cache
def same_compiler() -> bool:
    return bool(report()["nvcc"] == kernel_table.read_table()["nvcc"])


@functools.cache
def traits() -> dict[str, dict[str, Any]]:
    """The kernels' constants by kernel_table.traits_key."""
    if kernel_build.headers() is None:
        pytest.skip("needs the CUDA toolkit's headers")
    found = kernel_build.traits(kernel_build.generated_sources())
    return {kernel_table.traits_key(t): t for t in found}


def traits_of(row: Row) -> dict[str, Any]:
    """The constants of a row's kernel."""
    return traits()[kernel_table.constants_of(row["kernel"])]
