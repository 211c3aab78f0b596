"""The emulated tests of the head under AddressSanitizer and UndefinedBehaviorSanitizer, in two
orders of the threads at once."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import emulation
import pytest
from test_attention_sanitized import SCHEDULES, TESTS, start

pytestmark = pytest.mark.slow

SUITE = [
    "test_distillation.py",
    "test_distillation_rows.py",
    "test_head_numerics.py",
    "test_head_options.py",
    "test_head_rows_errors.py",
    "test_head_targets.py",
    "test_linear_cross_entropy.py",
    "test_linear_cross_entropy_autograd.py",
    "test_softmax_rows.py",
    "test_token_logprobs.py",
]
FEWEST_TESTS = 1200


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
