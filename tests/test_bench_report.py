"""Tables and figures: drawn from documents alone, the same each time, and the committed page is
what the committed results give."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from bench import report, results
from bench_documents import document, entry, failed

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"


def committed():
    return [results.load(path) for path in results.committed()]


def test_the_committed_page_is_what_the_committed_results_give():
    again = "python -m bench report --page docs/benchmarks.md --out docs/figures"
    assert PAGE.read_text() == report.markdown(committed(), "figures"), f"stale; run {again}"


def test_the_committed_figures_show_the_committed_cases():
    """Not to the byte, as versions of matplotlib differ: the names that stand in them."""
    for made in committed():
        for name, content in report.figures(made).items():
            stored = ROOT / "docs" / "figures" / name
            assert texts(stored.read_bytes()) == texts(content), f"{name} is stale"


def texts(svg: bytes) -> list[str]:
    """The words in a figure, without the numbers of its axes."""
    root = ElementTree.fromstring(svg)
    found = ["".join(t.itertext()).strip() for t in root.iter("{http://www.w3.org/2000/svg}text")]
    return [word for word in found if re.search("[a-z]", word)]


def made():
    without = entry(peak=None)
    without["runs"].pop("dense")
    missed = entry(ratio=2.0, figure=0.2)
    missed["bars"]["time/liger"] = {"limit": 1.0, "reached": None, "holds": None}
    return document(
        head__main=entry(), head__none=missed, head__z=failed("off|by one"), a__b=without
    )


def test_tables_hold_every_number():
    page = report.markdown([made()])
    for line in (
        "## A CPU, 2 cores",
        "| `head/main` | memory_over_logits | 0.15 | 0.1 | held |",
        "| `head/none` | memory_over_logits | 0.15 | 0.2 | **missed** |",
        "| `head/none` | time/liger | 1 |  | not measured |",
        "| `head/main` | 500 ms | dense 0.500 (0.450 to 0.550)<br>"
        "floor 1.250 (1.125 to 1.375) (floor) | 3 |",
        "| `head/z` | **failed** | off\\|by one |  |",
        "| `head/main` | 1000 B | dense 1.95 KiB (0.500) |",
        "| `head/main` | fill | 0.5 |",
        "| liger | runs on CUDA only | `head/main`, `head/none`, `head/z`, `a/b` |",
    ):
        assert line in page.splitlines(), line
    assert "commit 0000000000, 2026-01-02: all 4 cases" in page
    assert "![" not in page


def test_a_page_says_what_is_unknown():
    unknown = entry(rounds=None)
    unknown["environment"] |= {"commit": None, "dirty": None}
    edited = entry()
    edited["environment"] |= {"dirty": True}
    page = report.markdown([document(head__main=unknown, head__bias=edited)])
    assert "commit unknown (edits unknown), 2026-01-02: `head/main`" in page
    assert "commit 0000000000 with edits, 2026-01-02: `head/bias`" in page
    assert re.search(r"`head/main` .*\| unknown \|", page)


def test_an_empty_document_still_gives_a_page():
    page = report.markdown([document()])
    for sentence in ("No bars.", "No cases.", "Nothing was measured.", "No run was left out."):
        assert sentence in page


def test_figures_are_deterministic():
    first, second = report.figures(made()), report.figures(made())
    assert first == second
    assert list(first) == ["bench_time_a_cpu_2.svg", "bench_memory_a_cpu_2.svg"]
    words = texts(first["bench_time_a_cpu_2.svg"])
    assert {"head/main", "head/none", "a/b", "dense", "floor"} <= set(words)
    assert "head/z" not in words
    assert b"date" not in first["bench_time_a_cpu_2.svg"]


def test_a_page_names_its_figures():
    page = report.markdown([made()], "../pictures")
    for name in report.figures(made()):
        assert f"](../pictures/{name})" in page


@pytest.mark.parametrize(
    "seconds, text", [(61.04, "61 s"), (0.0123, "12.3 ms"), (4.567e-5, "45.7 µs")]
)
def test_times(seconds, text):
    assert report.time_text(seconds) == text


@pytest.mark.parametrize(
    "count, text",
    [
        (12, "12 B"),
        (2048, "2 KiB"),
        (3 << 20, "3 MiB"),
        (5 << 29, "2.5 GiB"),
        (1023 << 20, "1023 MiB"),
    ],
)
def test_bytes(count, text):
    assert report.bytes_text(count) == text
