"""Registers, spills, shared memory and blocks per SM of every kernel, against the committed table
csrc/tools/budgets.json (``python csrc/tools/kernel_report.py --write`` rewrites it)."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path

import kernels
import pytest
from emulation import cuda_headers
from kernels import COMMITTED, GROUPS, KEYS, ROOT, kernel_table

import kernel_bars  # isort: skip  (csrc/tools, put on the path by kernels)
import kernel_build  # isort: skip
import kernel_model  # isort: skip

REGISTERS = (16, 24, 32, 40, 56, 64, 72, 96, 127, 128, 129, 160, 168, 169, 192, 200, 224, 248, 255)
SHARED = (0, 1, 1000, 8 << 10, 16512, 24704, 32 << 10, 49280, 65664, 99 << 10, (99 << 10) + 1)


def budget(row: kernels.Row) -> kernels.Row:
    return {name: value for name, value in row.items() if name != "sass"}


@pytest.mark.parametrize("group", GROUPS)
def test_budget(group):
    found, same = kernels.rows(), kernels.same_compiler()
    for key in GROUPS[group]:
        assert key in found, "no such kernel any more: rewrite the table"
        row = budget(found[key])
        assert kernel_table.differences(budget(COMMITTED[key]), row, same) == [], key
        assert kernel_bars.violations(row, kernels.traits_of(row)) == [], key


def test_every_kernel_is_in_the_table():
    assert kernels.rows().keys() - COMMITTED.keys() == set()


@pytest.mark.parametrize("group", GROUPS)
def test_committed_budgets_reach_the_bars(group):
    for key in GROUPS[group]:
        row = COMMITTED[key]
        assert kernel_bars.violations(row, kernels.traits_of(row)) == [], key


def test_compiler_processes_stay_below_2_gb():
    kernels.rows()
    peaks = kernels.report()["peak_kib"]
    assert len(peaks) >= 2 * (14 + 14)
    assert min(peaks.values()) > 30 << 10  # of a compiler, not of the shell before it
    assert {unit: kib for unit, kib in peaks.items() if kib >= 2 << 20} == {}


def test_generated_sources_are_those_the_launch_asks_for():
    """One list stands in attention.cmake, the other in head_dims.h."""
    source = (ROOT / "csrc/attention/head_dims.h").read_text()
    asked = set(re.findall(r"HeadDims<(\d+), (\d+)>\{\}", source))
    instances = {f"{t}_{d}_{v}" for d, v in asked for t in ("bf16", "fp16")}
    made = {s.stem for s in kernel_build.generated_sources()}
    assert made == {f"{p}_{i}" for p in ("forward", "backward") for i in instances}
    for kernel in ("attention_forward", "attention_backward", "attention_backward_query"):
        own = [key[0].split()[2] for key in KEYS if key[0].split()[0] == kernel]
        assert set(own) == {f"{d}/{v}" for d, v in asked}


@pytest.mark.parametrize("name", kernel_model.TABLES)
def test_the_model_in_the_notes_is_that_of_the_table(name):
    found = kernel_model.section(name, list(COMMITTED.values()))
    assert kernel_model.written_section(name) == found


def test_code_is_compiled_anew_and_words_are_not(tmp_path: Path):
    def digest(name: str, text: str) -> str:
        source = tmp_path / name
        source.write_text(text)
        return kernel_build.digest_of(source)

    first = digest("a.cu", '#include "common/math.h"\nint a;  // one\n')
    assert digest("b.cu", '// two\n\n#include "common/math.h"\nint a;\n') == first
    assert digest("c.cu", '#include "common/math.h"\nint b;\n') != first
    assert digest("d.cu", '#include "common/vec.cuh"\nint a;\n') != first


# --- the checks themselves ------------------------------------------------------------------------


def test_blocks_per_sm_are_those_of_the_toolkit(tmp_path: Path):
    compiler, headers = shutil.which("g++"), cuda_headers()
    if compiler is None or headers is None or not (headers / "cuda_occupancy.h").is_file():
        pytest.skip("needs g++ and the CUDA toolkit's cuda_occupancy.h")
    program = tmp_path / "occupancy"
    source = ROOT / "tests/cpp/occupancy.cpp"
    subprocess.run([compiler, "-std=c++17", "-isystem", headers, source, "-o", program], check=True)
    cases = [
        (device, threads, registers, shared)
        for device in kernel_table.DEVICES
        for threads in (32, 96, 128, 256, 1024)
        for registers in REGISTERS
        for shared in (*SHARED, kernel_table.DEVICES[device].block_shared)
    ]
    lines, expected = [], []
    for name, threads, registers, shared in cases:
        sm = kernel_table.DEVICES[name]
        limits = f"{name[3]} {name[4]} {sm.threads} {sm.shared} {sm.block_shared}"
        lines.append(f"{limits} {threads} {registers} {shared}\n")
        expected.append(sm.blocks_of(threads, registers, shared))
    answer = subprocess.run(program, input="".join(lines), capture_output=True, text=True).stdout
    wrong = [
        (case, own, int(theirs))
        for case, own, theirs in zip(cases, expected, answer.split(), strict=True)
        if own != int(theirs)
    ]
    assert wrong == []
    assert len(set(expected)) > 10


ROW = COMMITTED["attention_forward bf16 128/128 plain", "sm_80"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("registers", 252), ("spill_loads", 4), ("dynamic_shared", 1), ("tile", [128, 128])],
)
def test_a_changed_budget_is_a_difference(name, value):
    changed = copy.deepcopy(ROW) | {name: value}
    assert kernel_table.differences(ROW, ROW, same_compiler=True) == []
    [line] = kernel_table.differences(ROW, changed, same_compiler=True)
    assert line == f"{name} is {value}, not {ROW[name]}"
    other = kernel_table.differences(ROW, changed, same_compiler=False)
    assert (other == []) == (name in ("registers", "spill_loads"))


def test_another_compiler_may_not_fit_fewer_blocks():
    fewer = copy.deepcopy(ROW)
    fewer["blocks_per_sm"]["sm_80"] -= 1
    [line] = kernel_table.differences(ROW, fewer, same_compiler=False)
    assert line == "1 blocks on sm_80, not 2"
    assert kernel_table.differences(fewer, ROW, same_compiler=False) == []
    assert kernel_table.differences(fewer, ROW, same_compiler=True) != []


def test_each_device_has_one_table_of_backward_tiles():
    """Large tiles where they fit, as backward_launch.cu picks; sm_90's small ones run nowhere."""
    own = kernels.traits()["attention_backward 128/128 plain"]
    small = kernels.traits()["attention_backward 128/128 plain small"]
    assert own["dynamic_shared"] == own["large_shared"] == small["large_shared"] > 99 << 10
    assert kernel_table.devices("sm_80", own) == ["sm_80"]
    assert kernel_table.devices("sm_80", small) == ["sm_86", "sm_89"]
    assert kernel_table.devices("sm_90", own) == ["sm_90"]
    assert kernel_table.devices("sm_90", small) == []
    for row in COMMITTED.values():
        table = kernels.traits_of(row)
        assert list(row["blocks_per_sm"]) == kernel_table.devices(row["arch"], table)


@pytest.mark.parametrize("name", ["stack", "spill_stores", "spill_loads"])
def test_spills_miss_the_bar(name):
    own = kernels.traits_of(ROW)
    assert kernel_bars.violations(ROW | {name: 8}, own) == [f"{name} is 8"]
    nowhere = ROW | {"blocks_per_sm": {"sm_86": 0}}
    assert kernel_bars.violations(nowhere, own) == ["doesn't run on sm_86"]


def test_what_ptxas_prints_is_read():
    [(name, report)] = kernel_table.ptxas_reports(
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function 'a_kernel' for 'sm_80'\n"
        "ptxas info    : Function properties for a_kernel\n"
        "    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 2 barriers, 1024 bytes smem, 608 bytes cmem[0]\n"
    ).items()
    assert name == "a_kernel"
    assert report == {
        "registers": 255,
        "stack": 16,
        "spill_stores": 24,
        "spill_loads": 32,
        "static_shared": 1024,
        "barriers": 2,
    }
