"""The rules of csrc/README.md, and the budgets that keep files readable."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CXX_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}
CXX = sorted(p for p in CSRC.rglob("*") if p.suffix in CXX_SUFFIXES)
PYTHON = sorted((ROOT / "python").rglob("*.py"))
WRITTEN = [
    *CXX,
    *PYTHON,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.cpp")),
    *sorted((ROOT / "bench").rglob("*.py")),
]

TOPICS = ("attention", "cross_entropy", "encoder", "streaming")
BLOCKS = ("tile", "varlen")
MAY_INCLUDE = {
    "common": {"common"},
    "ptx": {"common", "ptx", "emu"},  # wrappers pick their host twin
    **{ring: {"common", "ptx", *BLOCKS} for ring in BLOCKS},
    **{topic: {"common", "ptx", *BLOCKS, topic} for topic in TOPICS},
    "torch": {"common", "ptx", *BLOCKS, *TOPICS, "torch"},
    "emu": {"common", "emu"},
}
EMULATED = "csrc/torch/emulated.cpp"  # steers the emulator, in the build of tests/cpp only
GENERATED = {"build_config.h"}
SOFT_LINES, HARD_LINES, FUNCTION_LINES = 400, 600, 80


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(path: Path) -> str:
    """C++ source without comments and string literals."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)
    return re.sub(r'(?<!#include )"(?:\\.|[^"\\\n])*"', '""', text)


def ring_of(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


def own_includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, flags=re.M)


def system_includes(text: str) -> list[str]:
    return re.findall(r"^\s*#\s*include\s+<([^>]+)>", text, flags=re.M)


@pytest.mark.parametrize("path", CXX, ids=name_of)
def test_includes_point_down(path: Path):
    ring = ring_of(path)
    for include in own_includes(path.read_text()):
        if include in GENERATED:
            assert ring == "torch", f"{include} is for csrc/torch only"
            continue
        assert (CSRC / include).is_file(), f"includes are written from csrc/: {include}"
        allowed = MAY_INCLUDE[ring] | ({"emu"} if name_of(path) == EMULATED else set())
        assert include.split("/")[0] in allowed, f"{ring} must not include {include}"


@pytest.mark.parametrize("path", CXX, ids=name_of)
def test_torch_stays_in_its_ring(path: Path):
    foreign = [i for i in system_includes(path.read_text()) if i.split("/")[0] in ("ATen", "c10")]
    assert not foreign, f"outside torch's stable ABI: {foreign}"
    framework = [
        i for i in system_includes(path.read_text()) if i.split("/")[0] in ("torch", "pybind11")
    ]
    if ring_of(path) != "torch" or path.suffix in (".cu", ".cuh"):
        assert not framework, f"only csrc/torch sees torch and pybind11: {framework}"


@pytest.mark.parametrize("path", CXX, ids=name_of)
def test_device_code_keeps_to_its_places(path: Path):
    code = code_of(path)
    if ring_of(path) != "ptx" and name_of(path) != "csrc/emu/fiber.cpp":  # its context switch
        assert not re.search(r"\basm\b", code), "asm belongs in csrc/ptx"
    if path.name != "thread.h":
        builtin = re.search(r"\b(threadIdx|blockIdx|blockDim|gridDim)\b", code)
        assert not builtin, "positions come from common/thread.h"
    if not path.name.endswith("_launch.cu") and name_of(path) != "csrc/ptx/launch.cuh":
        assert "<<<" not in code, "launches belong in *_launch.cu"
        assert "__global__" not in code, "entry points belong in *_launch.cu"
    assert not re.search(r"\b(printf|abort|exit)\s*\(", code), (
        "the library prints and aborts nothing"
    )


def listed_sources(cmake_lists: Path) -> set[str]:
    """The sources a CMakeLists.txt names, whose blocks must be sorted."""
    text = cmake_lists.read_text()
    for block in re.findall(r"set\(\w+_sources(.*?)\)", text, re.S):
        assert block.split() == sorted(block.split())
    return set(re.findall(r"csrc/\S+\.(?:cpp|cu)\b", text))


def test_every_source_is_listed_and_sorted():
    listed = listed_sources(ROOT / "CMakeLists.txt")
    sources = {name_of(p) for p in CXX if p.suffix in (".cpp", ".cu") and ring_of(p) != "emu"}
    assert listed == sources - {EMULATED}
    emulated = {s for s in listed_sources(ROOT / "tests/cpp/CMakeLists.txt") if "*" not in s}
    assert EMULATED in emulated and emulated <= sources


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_file_length(path: Path):
    lines = len(path.read_text().splitlines())
    assert lines <= HARD_LINES, f"{lines} lines: split it"
    if lines > SOFT_LINES and path not in (ROOT / "tests").rglob("*"):
        warnings.warn(f"{name_of(path)} has {lines} lines, over {SOFT_LINES}", stacklevel=1)


def test_cmake_length():
    assert len((ROOT / "CMakeLists.txt").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_function_length(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = [n for n in node.body if not isinstance(getattr(n, "value", None), ast.Constant)]
        if body:  # the docstring doesn't count
            lines = body[-1].end_lineno - body[0].lineno + 1
            assert lines <= FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_the_readers_of_this_file_see_violations(tmp_path: Path):
    """The helpers above do find what they look for."""
    sample = tmp_path / "sample.cu"
    sample.write_text('#include "a/b.h"\n# include <torch/all.h>\n// asm\nint x; /* asm */ "asm";')
    assert own_includes(sample.read_text()) == ["a/b.h"]
    assert system_includes(sample.read_text()) == ["torch/all.h"]
    assert "asm" not in code_of(sample)
    sample.write_text('asm volatile("bar.sync 0;");')
    assert re.search(r"\basm\b", code_of(sample))
