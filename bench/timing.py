"""Paired timing and the record of where it was done, shared by the CPU benchmarks."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import varstream

RESULTS = Path(__file__).parent / "results"


def paired(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one warm-up.

    All runs take part in every round, in an order that rotates, so that a slow phase of the machine
    hits all of them; compare them by the ratio within a round (``ratio``).
    """
    for run in runs.values():
        run()
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum of one value or more."""
    # A single value is its own quartiles; before Python 3.13 quantiles refuses it.
    spread = values if len(values) > 1 else values * 2
    low, median, high = statistics.quantiles(spread, n=4, method="inclusive")
    return {"median": median, "quartile_1": low, "quartile_3": high, "min": min(values)}


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Summary of the per-round ratios of two runs."""
    pairs = zip(seconds[name], seconds[base], strict=True)
    return summary([ours / theirs for ours, theirs in pairs])


Bars = dict[str, dict[str, Any]]


def against(bars: Iterable[tuple[str, float]], reached: Mapping[str, float]) -> Bars:
    """Each bar beside the figure reached; figures that weren't measured are left out."""
    return {
        key: {"bar": bar, "reached": reached[key], "holds": reached[key] <= bar}
        for key, bar in bars
        if key in reached
    }


def print_bars(bars: Bars) -> None:
    """One line a bar."""
    for key, bar in bars.items():
        verdict = "holds" if bar["holds"] else "MISSED"
        print(f"  {key}: {bar['reached']:.5g} against {bar['bar']} {verdict}")


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The checked-out commit, marked when files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Machine, versions and commit of a CPU run; the load tells how quiet the machine was."""
    return {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_1_minute": os.getloadavg()[0],
        "torch": torch.__version__,
        "varstream": varstream.__version__,
        "python": platform.python_version(),
        "git_commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def store(topic: str, report: Mapping[str, Any]) -> Path:
    """Put one topic's report into this CPU's file under ``results/``; other topics stay."""
    name = "".join(
        c if c.isalnum() else "_" for c in f"{cpu_name()}_{os.cpu_count()}_cores".lower()
    )
    path = RESULTS / f"{name}.json"
    topics = json.loads(path.read_text()) if path.exists() else {}
    topics[topic] = report
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(topics, indent=2) + "\n")
    return path
