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
# Of clusters: the bug, and the words of an error that must be told (a wrong sum has none).
CLUSTER_BUGS = {
    "reads before the peers have written": ("1", ""),
    "writes before the peers have read": ("2", ""),
    "ends before the peers have read": ("3", "reads the shared memory of a block that has ended"),
    "arrives twice": ("4", "arrives at the cluster's barrier twice"),
    "one warp stays away": ("5", "waits for the barrier of its cluster"),
    "the last block writes over the end": ("6", "a guard gap was written"),
}


def cuda_headers() -> Path | None:
    """Where cuda_bf16.h is: it compiles with a host compiler too."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).parent.parent, "/usr/local/cuda"]
    found = [Path(home) / "include" for home in homes if home]
    return next((p for p in found if (p / "cuda_bf16.h").is_file()), None)


@pytest.fixture(scope="module", params=BUILDS)
def binaries(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs emu_test and emu_cluster_test, built in one way."""
    headers = cuda_headers()
    if COMPILER is None or headers is None:
        pytest.skip("needs a host C++ compiler and CUDA's headers")
    folder = tmp_path_factory.mktemp("emulator")
    include = [f"-I{ROOT / 'csrc'}", "-isystem", str(headers)]
    flags = ["-std=c++17", "-O2", "-DVARSTREAM_EMULATED", *BUILDS[request.param], *include]
    emulator = sorted((ROOT / "csrc/emu").glob("*.cpp"))
    subprocess.run([COMPILER, *flags, "-c", *emulator], check=True, cwd=folder)
    objects = [folder / f"{source.stem}.o" for source in emulator]
    for name in ("emu_test", "emu_cluster_test"):
        sources = [ROOT / f"tests/cpp/{name}.cpp", *objects]
        subprocess.run([COMPILER, *flags, *sources, "-o", folder / name], check=True)
    return folder


@pytest.fixture(scope="module")
def binary(binaries: Path) -> Path:
    return binaries / "emu_test"


@pytest.fixture(scope="module")
def cluster_binary(binaries: Path) -> Path:
    return binaries / "emu_cluster_test"


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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_clusters_and_counted_bytes(cluster_binary: Path, schedule: str):
    result = run(cluster_binary, schedule)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 failures" in result.stdout


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", CLUSTER_BUGS)
def test_bugs_planted_into_clusters_are_caught(cluster_binary: Path, bug: str, schedule: str):
    number, words = CLUSTER_BUGS[bug]
    result = run(cluster_binary, schedule, number)
    if bug == "writes before the peers have read" and schedule == "round-robin":
        assert result.returncode == 1  # blocks in step never meet it, on a device they would
        return
    overrun = "AddressSanitizer" in result.stderr
    assert result.returncode == 0 or overrun, f"{bug} went unnoticed: {result.stdout}"
    assert words in result.stdout or (overrun and bug == "the last block writes over the end")
