"""What the benchmarks share: summaries of timings."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import timing

BENCH = Path(timing.__file__).parent


def test_summary_of_one_round():
    assert timing.summary([2.0]) == {
        "median": 2.0,
        "quartile_1": 2.0,
        "quartile_3": 2.0,
        "min": 2.0,
    }


def test_summary_of_rounds():
    found = timing.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"median": 3.0, "quartile_1": 2.0, "quartile_3": 4.0, "min": 1.0}


def test_ratio_is_within_a_round():
    seconds = timing.paired({"a": lambda: None, "b": lambda: None}, rounds=1)
    assert timing.ratio(seconds, "a", "b")["median"] == pytest.approx(
        seconds["a"][0] / seconds["b"][0]
    )


def test_bars_are_set_against_what_was_reached(capsys):
    bars = timing.against(
        [("time", 1.1), ("memory", 0.5), ("unmeasured", 1.0)], {"time": 1.1, "memory": 0.6}
    )
    assert bars == {
        "time": {"bar": 1.1, "reached": 1.1, "holds": True},
        "memory": {"bar": 0.5, "reached": 0.6, "holds": False},
    }
    timing.print_bars(bars)
    assert (
        capsys.readouterr().out
        == "  time: 1.1 against 1.1 holds\n  memory: 0.6 against 0.5 MISSED\n"
    )


def test_readme_names_every_topic():
    topics = {p.stem for p in BENCH.glob("*.py") if "__main__" in p.read_text()}
    readme = (BENCH / "README.md").read_text()
    assert topics
    assert not [topic for topic in topics if f"python -m bench.{topic}`" not in readme]
