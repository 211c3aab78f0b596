"""bench/gpu.sh without a GPU: its steps run on after a failure, the tests and cases that it names
exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench.cases import all_cases, matching

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench/gpu.sh"
BACKWARD = ("64", "128", "ragged", "grouped", "rest")
MODELS = ("qwen3-4b", "qwen3-8b", "llama-8b")
BENCH = (
    *("bench-dense", "bench-ragged", "bench-grouped", "bench-rest"),
    *(f"bench-backward-{part}" for part in BACKWARD),
    *("bench-chunks", "bench-sums"),
    *("bench-head", "bench-head-shapes", "bench-head-kinds"),
    *("bench-logprobs", "bench-distillation"),
    *("bench-stream-8k", "bench-stream-16k-full", "bench-stream-16k-lora"),
    *(f"bench-stream-32k-{model}" for model in MODELS),
    "bench-stream-64k-packed",
    *(f"bench-stream-{length}-{model}" for length in ("64k", "128k") for model in MODELS),
)
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZE = (*TOOLS, *(f"{tool}-{part}" for part in ("backward", "head") for tool in TOOLS))
STEPS = ("build", "test", *SANITIZE, *BENCH)
# The cases of bench-rest are those of no other step.
ELSEWHERE = (
    "attention_(forward|backward|chunks)|tile_schedule|head|head_rows|logprobs|distillation|"
    "stream_gpu"
)

# Stands for python and for compute-sanitizer: notes its arguments, fails where told to.
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in *"bench list --names"*)
    printf '%s/x\\n' attention_forward attention_backward attention_chunks merge head pack ;; esac
[ -z "$FAILS" ] || [[ "$*" != *"$FAILS"* ]]
"""


@pytest.fixture
def script(tmp_path):
    """Runs a copy of the script, away from this checkout, with stubs in place of the tools."""
    (tmp_path / "bench").mkdir()
    shutil.copy(SCRIPT, tmp_path / "bench/gpu.sh")
    (tmp_path / "bin").mkdir()
    for tool in ("python", "compute-sanitizer"):
        (tmp_path / "bin" / tool).write_text(STUB)
        (tmp_path / "bin" / tool).chmod(0o755)
    calls = tmp_path / "calls"

    def run(*steps, fails="", sanitizer=True):
        calls.write_text("")
        if not sanitizer:
            (tmp_path / "bin/compute-sanitizer").unlink()
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "PYTHON": str(tmp_path / "bin/python"),
            "CALLS": str(calls),
            "FAILS": fails,
        }
        command = ["bash", str(tmp_path / "bench/gpu.sh"), *steps]
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
        summary = done.stdout.partition("=== summary\n")[2].split("\n")[:-1]
        return done, summary, calls.read_text()

    return run


def test_every_step_runs_in_order(script):
    done, summary, calls = script()
    assert done.returncode == 0, done.stderr
    assert summary == [f"{name}: ok" for name in STEPS]
    for tool in TOOLS:
        lines = re.findall(rf"--tool {tool} .*", calls)
        assert ["test_attention_backward" in line for line in lines] == [False, True, False]
        assert ["test_softmax_rows" in line for line in lines] == [False, False, True]
        for line in lines:
            assert "--error-exitcode 1" in line and "-m pytest -q -m gpu and not slow" in line
            # A filtered initcheck would not see the copies that fill our inputs.
            assert ("kns=varstream" in line) == (tool in ("racecheck", "synccheck"))
    assert "bench run --device cuda merge/x pack/x\n" in calls
    assert "bench run --device cuda --rounds 1 stream_gpu/llama_8b_*_128k\n" in calls


def test_a_failure_stops_nothing_but_is_told(script):
    done, summary, calls = script(fails="pytest -q -m gpu tests")
    assert done.returncode == 1
    assert summary[:3] == ["build: ok", "test: FAILED, exit code 1", "memcheck: ok"]
    assert len(summary) == len(STEPS) and calls.count("bench run") == len(BENCH)
    done, summary, calls = script("sanitize", "bench", fails="attention_forward/dense")
    assert done.returncode == 1
    assert [line for line in summary if "FAILED" in line] == ["bench-dense: FAILED, exit code 1"]
    assert len(summary) == len(SANITIZE) + len(BENCH)


def test_nothing_follows_a_failed_build(script):
    done, summary, calls = script(fails="pip install")
    assert done.returncode == 1 and summary == ["build: FAILED, exit code 1"]
    assert "pytest" not in calls


def test_sanitizers_are_left_out_where_there_are_none(script):
    if Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("the script finds this machine's compute-sanitizer")
    done, summary, _ = script("test", "sanitize", sanitizer=False)
    assert done.returncode == 0
    assert summary[1] == "memcheck: left out, compute-sanitizer not found"


def test_a_wrong_step_is_named():
    done = subprocess.run(["bash", SCRIPT, "mesure"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("bench/gpu.sh: no step mesure; steps: build test memcheck")


def test_every_gpu_case_is_in_one_step():
    found: list[str] = []
    steps = r"^    bench-[\w-]+\) (?:run_cases|run_steps \d) (.*) ;;$"
    for patterns in re.findall(steps, SCRIPT.read_text(), re.M):
        found += [case.name for case in matching([p.strip("'") for p in patterns.split()])]
    on_gpu = [name for name, case in all_cases().items() if "cuda" in case.devices]
    assert f"\nelsewhere='{ELSEWHERE}'\n" in SCRIPT.read_text()
    rest = [n for n in on_gpu if not re.match(f"({ELSEWHERE})/", n)]
    assert rest and sorted(found + rest) == sorted(on_gpu)


def test_every_selection_finds_tests_of_a_gpu():
    """Collected as on a machine with a GPU."""
    text = SCRIPT.read_text()
    names = dict(re.findall(r'^(attention_\w+|backward_\w+|packing_some)="(.*)"$', text, re.M))
    most = names["attention_most"].replace("$attention_small", names["attention_small"])
    backward = [str(path) for path in ROOT.glob(names["backward_files"])]
    assert backward
    files = [*names["attention_files"].split(), *backward, "tests/gpu/test_packing_gpu.py"]
    code = (
        "import sys, torch, pytest\n"
        "torch.cuda.is_available = lambda: True\n"
        "sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider',"
        " '-m', 'gpu and not slow', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    collected = re.findall(r"^(\S+::\w+\[?[^\n]*)", done.stdout, re.M)
    for words in (most, names["attention_small"], names["packing_some"], names["backward_all"]):
        for word in words.split(" or "):
            assert any(word in test for test in collected), f"no test of a GPU holds {word!r}"
