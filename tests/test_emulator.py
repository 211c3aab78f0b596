"""The host emulator and the wrappers' host twins; planted bugs are caught.

Twice: under sanitizers, with the context switch in assembly; and without sanitizers, where the
emulator has to notice by itself, with the portable switch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++") or shutil.which("c++")
BUILDS = {
    "sanitized": ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "portable": ["-DVARSTREAM_PORTABLE_FIBERS"],
}
SCHEDULES = ["warp-greedy", "round-robin", "1", "2"]
BUGS = {
    "no barrier": "1",
    "no wait": "2",
    "wrong offset": "3",
    "short shared memory": "4",
    "one warp skips a barrier": "5",
}


def cuda_headers() -> Path | None:
    """Where cuda_bf16.h is: it compiles with a host compiler too."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).parent.parent, "/usr/local/cuda"]
    found = [Path(home) / "include" for home in homes if home]
    return next((p for p in found if (p / "cuda_bf16.h").is_file()), None)


@pytest.fixture(scope="module", params=BUILDS)
def binary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    headers = cuda_headers()
    if COMPILER is None or headers is None:
        pytest.skip("needs a host C++ compiler and CUDA's headers")
    path = tmp_path_factory.mktemp("emulator") / "emu_test"
    sources = [*sorted((ROOT / "csrc/emu").glob("*.cpp")), ROOT / "tests/cpp/emu_test.cpp"]
    include = [f"-I{ROOT / 'csrc'}", "-isystem", headers]
    flags = ["-std=c++17", "-O2", "-DVARSTREAM_EMULATED", *BUILDS[request.param]]
    subprocess.run([COMPILER, *flags, *include, *sources, "-o", path], check=True)
    return path


def run(binary: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # An error abandons fibers with what they own, which is no leak of the kernel's.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([binary, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_instructions_and_a_product(binary: Path, schedule: str):
    result = run(binary, schedule)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failures" in result.stdout


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(binary: Path, bug: str, schedule: str):
    result = run(binary, schedule, BUGS[bug])
    caught = result.returncode == 0 or "AddressSanitizer" in result.stderr
    assert caught, f"{bug} went unnoticed: {result.stdout}"
    if bug == "one warp skips a barrier":
        assert "deadlock" in result.stdout and "waits for barrier 0" in result.stdout
