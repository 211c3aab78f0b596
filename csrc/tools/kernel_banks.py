#!/usr/bin/env python3
"""Bank conflicts of every pattern in which kernels read and write shared memory.

python csrc/tools/kernel_banks.py    # a line each; exit code 1 where there are conflicts

A program with the kernels' own tile code (kernel_banks.cpp.in) makes each lane's addresses; nothing
is measured. Words that every lane reads at one address, and searches whose addresses depend on
lengths, are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import kernel_build

Pattern = dict[str, Any]


def program() -> str:
    sources = kernel_build.generated_sources()
    calls = kernel_build.attention_calls(sources, "attention_kernels")
    return str(kernel_build.host_program("kernel_banks", {"attention_instances": calls}))


def patterns() -> list[Pattern]:
    """By kernel, instance, what is accessed and the instruction: how often all warps of a block do
    so for one tile, its wavefronts and those without a conflict."""
    return [json.loads(line) for line in kernel_build.output_of(program()).splitlines()]


def conflicts(pattern: Pattern) -> int:
    return int(pattern["wavefronts"] - pattern["ideal"])


def wavefronts(accesses: list[tuple[int, list[int]]]) -> list[tuple[int, int]]:
    """Of accesses (bytes a lane, its lanes' addresses): wavefronts without a conflict, and all."""
    lines = [f"{width} {' '.join(map(str, addresses))}\n" for width, addresses in accesses]
    answer = subprocess.run(
        [program(), "count"], input="".join(lines), capture_output=True, text=True, check=True
    )
    ideal, needed = zip(*(map(int, x.split()) for x in answer.stdout.splitlines()), strict=True)
    return list(zip(ideal, needed, strict=True))


def main() -> int:
    found = patterns()
    for one in found:
        name = f"{one['kernel']} {one['instance']}, {one['what']}: {one['count']}"
        print(f"{name} {one['instruction']}, {one['wavefronts']} wavefronts of {one['ideal']}")
    wrong = sum(conflicts(one) > 0 for one in found)
    print(f"{wrong} of {len(found)} patterns meet conflicts")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
