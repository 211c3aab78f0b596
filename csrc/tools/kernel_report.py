#!/usr/bin/env python3
"""Compares every kernel with the committed table of budgets, csrc/tools/budgets.json.

python csrc/tools/kernel_report.py           # differences; exit code 1 where there are any
python csrc/tools/kernel_report.py --write   # rewrites the table and the model in bench/NOTES.md
python csrc/tools/kernel_report.py --json    # what was found, for programs
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import kernel_build
import kernel_model
import kernel_table


def found() -> dict[str, Any]:
    compiled, traits = kernel_build.build()
    compiler, disassembler = kernel_build.nvcc(), kernel_build.nvdisasm()
    assert compiler is not None
    return {
        "nvcc": kernel_build.version(compiler),
        "nvdisasm": kernel_build.version(disassembler) if disassembler else None,
        "kernels": kernel_table.rows_of(compiled, traits),
        "traits": {kernel_table.traits_key(t): t for t in traits},
        "peak_kib": {f"{c.source} {c.arch}": c.peak_kib for c in compiled},
        "seconds": sum(c.seconds for c in compiled),
    }


def compare(report: dict[str, Any]) -> list[str]:
    """Differences from the table, a line each."""
    table = kernel_table.read_table()
    same = table["nvcc"] == report["nvcc"]
    committed = {kernel_table.key_of(row): row for row in table["kernels"]}
    own = {kernel_table.key_of(row): row for row in report["kernels"]}
    lines = [f"{' '.join(key)}: not in the table" for key in own.keys() - committed.keys()]
    lines += [f"{' '.join(key)}: not compiled" for key in committed.keys() - own.keys()]
    for key in committed.keys() & own.keys():
        for difference in kernel_table.differences(committed[key], own[key], same):
            lines.append(f"{' '.join(key)}: {difference}")
    return sorted(lines, key=kernel_table.natural)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="rewrite the committed table")
    mode.add_argument("--json", action="store_true", help="print what was found")
    arguments = parser.parse_args()
    try:
        report = found()
    except kernel_build.BuildError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(report))
        return 0
    if arguments.write:
        if report["nvdisasm"] is None:
            print("--write needs nvdisasm: set VARSTREAM_NVDISASM", file=sys.stderr)
            return 2
        text = kernel_table.table_text(report["kernels"], report["nvcc"], report["nvdisasm"])
        kernel_table.TABLE.write_text(text)
        kernel_model.write_sections(report["kernels"], report["traits"])
    lines = compare(report)
    print("\n".join(lines) or f"{len(report['kernels'])} kernels as in the table")
    print(
        f"{report['seconds']:.0f} s of processor time when compiled, "
        f"{max(report['peak_kib'].values()) >> 10} MiB in the largest process"
    )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
