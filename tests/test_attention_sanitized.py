"""The emulated attention tests under AddressSanitizer and UndefinedBehaviorSanitizer, in two orders
of the threads at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import emulation
import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parent
SUITE = [
    "test_attention.py",
    "test_attention_backward_buffers.py",
    "test_attention_backward_kernel.py",
    "test_attention_backward_streaming.py",
    "test_attention_dropout.py",
    "test_attention_kernel.py",
    "test_attention_launch.py",
]
SCHEDULES = ["warp-greedy", "20260"]  # a number: the seed of a random one
FEWEST_TESTS = 400


def runtime(name: str) -> str:
    """A sanitizer's library, as g++ finds it: it must be loaded before Python."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def environment(schedule: str) -> dict[str, str]:
    return os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own leaks, and fibers that an error abandons
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        emulation.SANITIZE: "1",
        emulation.SCHEDULE: schedule,
    }


def start(arguments: list[str], schedule: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env=environment(schedule),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    emulation.skip_unless_buildable()
    emulation.build(sanitize=True)


@pytest.fixture(scope="module")
def runs(library: None) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The suite in both orders, side by side."""
    pytest_run = ["-m", "pytest", "-q", "-m", "emulated", "-p", "no:cacheprovider"]
    files = [str(TESTS / name) for name in SUITE]
    started = {schedule: start([*pytest_run, *files], schedule) for schedule in SCHEDULES}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_suite_is_clean(runs: dict[str, subprocess.Popen[str]], schedule: str):
    output, _ = runs[schedule].communicate()
    assert runs[schedule].returncode == 0, output[-8000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) >= FEWEST_TESTS, output[-2000:]
    assert "skipped" not in output and "Sanitizer" not in output, output[-2000:]


def test_a_read_past_a_tensor_is_seen():
    """Otherwise the runs above would be clean whatever the kernels do."""
    code = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import torch, emulation
with emulation.emulated() as operators:
    operators.read_past_the_end(torch.zeros(64, dtype=torch.uint8))
"""
    process = start(["-c", code], "warp-greedy")
    output, _ = process.communicate()
    assert process.returncode != 0 and "heap-buffer-overflow" in output, output
    assert "read_past_the_end" in output
