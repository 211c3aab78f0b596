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
import kernel_head_model  # isort: skip
import kernel_model  # isort: skip
import kernel_pass_model  # isort: skip

HEAD = ROOT / "csrc/cross_entropy"
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
    assert len(peaks) >= 2 * (14 + 14 + 8)
    assert min(peaks.values()) > 30 << 10  # of a compiler, not of the shell before it
    assert {unit: kib for unit, kib in peaks.items() if kib >= 2 << 20} == {}


def test_generated_sources_are_those_the_launch_asks_for():
    """One list stands in attention.cmake, the other in head_dims.h."""
    source = (ROOT / "csrc/attention/head_dims.h").read_text()
    asked = set(re.findall(r"HeadDims<(\d+), (\d+)>\{\}", source))
    instances = {f"{t}_{d}_{v}" for d, v in asked for t in ("bf16", "fp16")}
    made = {s.stem for s in kernel_build.generated_sources() if s.parent.name == "attention"}
    assert made == {f"{p}_{i}" for p in ("forward", "backward") for i in instances}
    for kernel in ("attention_forward", "attention_backward", "attention_backward_query"):
        own = [key[0].split()[2] for key in KEYS if key[0].split()[0] == kernel]
        assert set(own) == {f"{d}/{v}" for d, v in asked}


def test_every_instance_of_the_head_is_in_the_table():
    """One list stands in cross_entropy.cmake, the other in the launches."""
    pairs = {
        kernel: {
            tuple(names.split(", "))
            for names in re.findall(
                rf"launch_{kernel}_instance<([^>]+)>\(", (HEAD / f"{kernel}_launch.cu").read_text()
            )
        }
        for kernel in ("softmax", "distillation")
    }
    short = {element: name for name, element in kernel_build.ELEMENTS.items()}
    asked = {f"softmax_{short[v]}_{short[g]}" for v, g in pairs["softmax"]}
    asked |= {f"distillation_fp32_{short[g]}" for (g,) in pairs["distillation"]}
    made = {s.stem for s in kernel_build.generated_sources() if s.parent.name == "cross_entropy"}
    assert made == asked
    wanted = set()
    for name in made:
        kernel, values, gradient = name.split("_")
        kinds = (" plain", " modified") if kernel == "softmax" else ("",)
        wanted |= {f"head_{kernel} {values}/{gradient}{kind}" for kind in kinds}
    assert {key[0] for key in KEYS if key[0].startswith("head_")} == wanted


@pytest.mark.parametrize("name", kernel_model.SECTIONS)
def test_the_model_in_the_notes_is_that_of_the_table(name):
    found = kernel_model.section(name, list(COMMITTED.values()), kernels.traits())
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


HEAD_ROW = COMMITTED["head_softmax fp32/bf16 plain", "sm_90"]


def test_rows_of_the_head_stay_on_chip_in_clusters():
    """sm_90: read once, a word of 16 bytes a slot, whole steps of two words of 256 threads."""
    own = kernels.traits_of(HEAD_ROW)
    fixed = own["dynamic_shared"] - 8 * 256 * 16  # the ring's slots
    assert {name: place["sm_90"] for name, place in HEAD_ROW["residency"].items()} == {
        str(classes): {
            "cluster": cluster,
            "kept": True,
            "dynamic_shared": fixed + -(-classes // cluster // 4 // 512) * 2 * 256 * 16,
            "blocks_per_sm": blocks,
        }
        for classes, cluster, blocks in (
            (32000, 2, 3),
            (128256, 8, 3),
            (151936, 8, 2),
            (256000, 8, 1),
        )
    }
    old = COMMITTED["head_softmax fp32/bf16 plain", "sm_80"]["residency"]
    assert [place["sm_80"]["kept"] for place in old.values()] == [True, False, False, False]
    assert all(place["sm_80"]["cluster"] == 1 for place in old.values())


def test_a_row_that_fits_nowhere_misses_the_bar():
    row = copy.deepcopy(HEAD_ROW)
    row["residency"]["256000"]["sm_90"]["blocks_per_sm"] = 0
    found = [line for line in kernel_bars.violations(row, kernels.traits_of(row)) if "run" in line]
    assert found == ["doesn't run on sm_90 with 256000 classes"]


def test_the_head_s_model_by_hand():
    """fp32 logits of 128256 classes on an H100: 8 blocks of 64 KB, three to an SM."""
    own = kernels.traits_of(HEAD_ROW)
    sums, gradient, _ = HEAD_ROW["sass"]["passes"]
    e = kernel_head_model.estimate(kernel_head_model.H100, HEAD_ROW, own, 128256)
    assert (e.moved, e.ideal) == (6, 6)
    slots = sums["mix"]["all"] / (4 * sums["words"]) + gradient["mix"]["all"] / (
        4 * gradient["words"]
    )
    assert e.slots == pytest.approx(slots)
    assert e.slots_allowed == pytest.approx(132 * 128 * 1.755e9 / (3.0e12 / 6))
    busy = 3 * 128256 / 8 * 6 / (3.0e12 / 132)
    assert (e.low, e.high) == (pytest.approx(busy / (busy + 2e-6)), 1.0)
    again = kernel_head_model.estimate(
        kernel_head_model.A100, COMMITTED["head_softmax fp32/bf16 plain", "sm_80"], own, 128256
    )
    assert (again.moved, again.ideal) == (10, 6)


def test_the_model_of_passes_by_hand():
    """An H100's rows of 128 values: two a warp, 16 lanes each; 512 bytes and three numbers."""
    gpu, one = kernel_head_model.H100, kernel_pass_model.prepare(128)
    assert (one.read, one.written) == (2 * 516, 2 * 8)
    row = COMMITTED[one.kernel, "sm_90"]
    e = kernel_pass_model.estimate(gpu, row, one)
    assert e.instructions == row["sass"]["round"]["all"]
    assert e.slots == pytest.approx(e.instructions / (132 * 4 * 1.755e9 * 1048 / 3.0e12))
    assert e.under_way == row["blocks_per_sm"]["sm_90"] * 8 * 1048
    assert e.needed == pytest.approx(3.0e12 / 132 * 0.8e-6)
    slow = copy.deepcopy(row)
    slow["sass"]["round"]["all"] *= 4
    assert kernel_pass_model.estimate(gpu, slow, one).share == pytest.approx(1 / (4 * e.slots))
    few = row | {"blocks_per_sm": {"sm_90": 1}}
    assert kernel_pass_model.estimate(gpu, few, one).share == pytest.approx(8 * 1048 / e.needed)
    words = kernel_pass_model.copy("gather_rows", 16)
    whole = COMMITTED[words.kernel, "sm_90"]["sass"]["round"]
    found = kernel_pass_model.estimate(gpu, COMMITTED[words.kernel, "sm_90"], words)
    assert found.instructions == whole["all"] * 4 / sum(whole["LDG"].values())
    assert found.under_way == found.threads / 32 * 4 * 32 * 16 * 2 / 2


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
