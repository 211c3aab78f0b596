"""Synthetic result documents for the tests of the benchmarks."""

from __future__ import annotations

import copy
from typing import Any

SUMMARY = {"median": 1.0, "quartile_1": 0.9, "quartile_3": 1.1, "min": 0.8}
DEVICE = {"kind": "cpu", "name": "A CPU", "cores": 2}


def summary(median: float) -> dict[str, float]:
    return {name: value * median for name, value in SUMMARY.items()}


def run(role: str, seconds: float, ratio: float | None, peak: int | None) -> dict[str, Any]:
    return {
        "role": role,
        "scale": 1.0,
        "error": None if role == "floor" else 0.0,
        "seconds": summary(seconds),
        "ratio": None if ratio is None else summary(ratio),
        "peak_bytes": peak,
    }


def entry(
    ratio: float = 0.5, peak: int | None = 1000, figure: float = 0.1, **changes: Any
) -> dict[str, Any]:
    """A case with a peer, a floor, and a bar on a figure."""
    made: dict[str, Any] = {
        "op": "operator",
        "shape": {"rows": 3},
        "dtype": "float32",
        "quick": False,
        "status": "ok",
        "failure": None,
        "reference": "dense",
        "tolerance": 1e-5,
        "rounds": 3,
        "runs": {
            "varstream": run("ours", 0.5, None, peak),
            "dense": run("peer", 0.5 / ratio, ratio, 2000),
            "floor": run("floor", 0.4, 1.25, None),
        },
        "unavailable": {"liger": "runs on CUDA only"},
        "figures": {"memory_over_logits": figure, "fill": 0.5},
        "bars": {"memory_over_logits": {"limit": 0.15, "reached": figure, "holds": figure <= 0.15}},
        "note": "forward",
        "environment": {
            "device": dict(DEVICE),
            "threads": 2,
            "torch": "2.13.0",
            "cuda": None,
            "varstream": "0.1",
            "python": "3.11.7",
            "commit": "0" * 40,
            "dirty": False,
            "date": "2026-01-02",
            "load_before": 0.1,
            "load_after": 0.2,
        },
    }
    return made | changes


def failed(why: str = "relative error 1 against dense exceeds 1e-05") -> dict[str, Any]:
    return entry(status="failed", failure=why, runs={}, figures={}, bars={}, rounds=0)


def document(**cases: dict[str, Any]) -> dict[str, Any]:
    """Cases by name, ``topic__variant`` standing for ``topic/variant``."""
    named = {name.replace("__", "/"): copy.deepcopy(case) for name, case in cases.items()}
    return {"schema": 1, "device": dict(DEVICE), "cases": named}
