"""The online softmax (csrc/tile/online_softmax.cuh) over hundreds of tiles, with multiply-adds
fused as nvcc fuses them: the emulated kernels are built without, and would hide what that adds."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import emulation
import pytest

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine() in ("x86_64", "AMD64")
CASES = ("constant", "rising", "falling", "early")
EPS = 2.0**-24  # half a unit in the last place, relative


def fuses() -> bool:
    """Whether this machine's instructions have a fused multiply-add."""
    if not X86:
        return platform.machine() in ("aarch64", "arm64")
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and " fma " in cpu.read_text()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    """By case: the LSE and the exact one, at several sizes of the scores."""
    emulation.skip_unless_buildable()
    if not fuses():
        pytest.skip("needs a host with fused multiply-add")
    program = tmp_path_factory.mktemp("softmax") / "softmax"
    sources = [
        *sorted((ROOT / "csrc/emu").glob("*.cpp")),
        ROOT / "tests/cpp/online_softmax_test.cpp",
    ]
    flags = ["-std=c++17", "-O2", "-ffp-contract=fast", *(["-mfma"] if X86 else [])]
    include = [f"-I{ROOT / 'csrc'}", "-isystem", str(emulation.cuda_headers())]
    emulation.run(
        "g++", *flags, "-DVARSTREAM_EMULATED", *include, *map(str, sources), "-o", str(program)
    )
    lines = subprocess.run(
        [program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    values: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for name, got, want in (line.split() for line in lines):
        values[name].append((float(got), float(want)))
    return values


@pytest.mark.parametrize("name", CASES)
def test_lse_does_not_drift_with_the_number_of_tiles(found, name):
    """The largest score and the LSE are rounded once each; beside that, an addition for each tile,
    of 300, and a few within."""
    assert len(found[name]) == 6
    for got, want in found[name]:
        assert abs(got - want) <= 1.5e-5 + 2 * EPS * abs(want)
