"""Figures and Markdown tables, drawn from result documents alone: the same documents give the same
bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import published
from .case import OURS
from .results import BenchError, Document

Entry = Mapping[str, Any]

# Okabe and Ito's palette, told apart by colour-blind readers and in print by the markers.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")

INTRODUCTION = """\
# Benchmarks

Drawn by `python -m bench report` from the JSON under `bench/results/`; nothing measured here is
typed by hand. Every result was checked against a reference before it was timed, ours and each
peer's in the same rounds. A ratio is our time over the peer's within a round, the median of all
rounds with its quartiles: below 1 is faster. A floor does only the part of the work that nobody can
leave out, so a ratio to it near 1 is the best there is. Memory is what a run adds to the allocated
tensors at its worst moment. `bench/README.md` says how to repeat the measurements and how to read
the JSON.
"""


def markdown(documents: Sequence[Document], figures: str | None = None) -> str:
    """The page of all documents; ``figures`` is the folder of the figures as the page sees it."""
    parts = [INTRODUCTION]
    for document in documents:
        parts.append(_section(document, figures))
    parts.append("\n".join(published.section()) + "\n")
    return "\n".join(parts)


def stem(document: Document) -> str:
    """Part of the figures' names that tells one device from another."""
    name = "".join(c if c.isalnum() else "_" for c in document["device"]["name"].lower())
    return f"{name}_{document['device']['cores']}"


def _section(document: Document, figures: str | None) -> str:
    device = document["device"]
    unit = "multiprocessors" if device["kind"] == "cuda" else "cores"
    lines = [f"## {device['name']}, {device['cores']} {unit}", "", *_environments(document)]
    lines += ["", "### Bars", "", *_bars(document), "", "### Time", "", *_times(document)]
    if figures:
        lines += ["", f"![Time ratios]({figures}/bench_time_{stem(document)}.svg)"]
    lines += ["", "### Peak memory", "", *_memory(document)]
    if figures:
        lines += ["", f"![Memory ratios]({figures}/bench_memory_{stem(document)}.svg)"]
    lines += ["", "### Other figures", "", *_figures(document)]
    lines += ["", "### Not measured", "", *_unavailable(document)]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> list[str]:
    """A Markdown table, or a sentence where there are no rows."""
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    if not body:
        return [empty]
    return ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |", *body]


def _environments(document: Document) -> list[str]:
    """With what the cases were measured: one line for each environment that occurs."""
    seen: dict[str, list[str]] = {}
    for name, entry in document["cases"].items():
        e = entry["environment"]
        commit = e["commit"][:10] if e["commit"] else "unknown"
        state = {True: " with edits", False: "", None: " (edits unknown)"}[e["dirty"]]
        cuda = f", CUDA {e['cuda']}" if e["cuda"] else ""
        words = (
            f"torch {e['torch']}{cuda}, {e['threads']} threads, Python {e['python']}, "
            f"commit {commit}{state}, {e['date']}"
        )
        seen.setdefault(words, []).append(name)
    total = len(document["cases"])
    return [
        f"- {words}: " + (f"all {total} cases" if len(names) == total else _listed(names))
        for words, names in seen.items()
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _bars(document: Document) -> list[str]:
    rows = []
    for name, entry in document["cases"].items():
        for metric, bar in entry["bars"].items():
            verdict = {True: "held", False: "**missed**", None: "not measured"}[bar["holds"]]
            reached = "" if bar["reached"] is None else f"{bar['reached']:.4g}"
            rows.append([f"`{name}`", metric, f"{bar['limit']:g}", reached, verdict])
    return _table(["case", "metric", "at most", "reached", ""], rows, "No bars.")


def _times(document: Document) -> list[str]:
    rows = []
    for name, entry in document["cases"].items():
        if entry["status"] == "failed":
            rows.append([f"`{name}`", "**failed**", entry["failure"], ""])
            continue
        own = time_text(entry["runs"][OURS]["seconds"]["median"])
        others = [
            f"{run} {_ratio_text(found['ratio'])}"
            + (" (floor)" if found["role"] == "floor" else "")
            for run, found in entry["runs"].items()
            if found["ratio"]
        ]
        rounds = "unknown" if entry["rounds"] is None else str(entry["rounds"])
        rows.append([f"`{name}`", own, "<br>".join(others) or "none", rounds])
    return _table(["case", "ours", "our time over", "rounds"], rows, "No cases.")


def _ratio_text(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['quartile_1']:.3f} to {ratio['quartile_3']:.3f})"


def _digits(value: float) -> str:
    """Three digits, never an exponent for a large number."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def time_text(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds * 1e6)} µs"


def bytes_text(count: float) -> str:
    """Three digits with a binary unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def _memory(document: Document) -> list[str]:
    rows = []
    for name, entry in document["cases"].items():
        ours = entry["runs"].get(OURS, {}).get("peak_bytes")
        if ours is None:
            continue
        others = [
            f"{run} {bytes_text(found['peak_bytes'])}"
            + (f" ({ours / found['peak_bytes']:.3f})" if found["peak_bytes"] else "")
            for run, found in entry["runs"].items()
            if run != OURS and found["peak_bytes"] is not None
        ]
        rows.append([f"`{name}`", bytes_text(ours), "<br>".join(others) or "none"])
    return _table(["case", "ours", "peers (our peak over theirs)"], rows, "Nothing was measured.")


def _figures(document: Document) -> list[str]:
    rows = [
        [f"`{name}`", figure, f"{value:.6g}"]
        for name, entry in document["cases"].items()
        for figure, value in entry["figures"].items()
    ]
    return _table(["case", "figure", "value"], rows, "None.")


def _unavailable(document: Document) -> list[str]:
    """Each run that was left out with its reason, cases with the same reason together."""
    seen: dict[tuple[str, str], list[str]] = {}
    for name, entry in document["cases"].items():
        for run, why in entry["unavailable"].items():
            seen.setdefault((run, why), []).append(name)
    rows = [[run, why, _listed(names)] for (run, why), names in seen.items()]
    return _table(["run", "why", "cases"], rows, "No run was left out.")


# --- figures ----------------------------------------------------------------------------------


def figures(document: Document) -> dict[str, bytes]:
    """SVG files by name: our time and our peak memory over each peer's and floor's."""
    times, memory = [], []
    for name, entry in document["cases"].items():
        if entry["status"] == "failed" or entry["quick"]:
            continue
        ours = entry["runs"][OURS]["peak_bytes"]
        for run, found in entry["runs"].items():
            if found["ratio"]:
                times.append((name, run, found["ratio"]["median"]))
            if run != OURS and ours and found["peak_bytes"]:
                memory.append((name, run, ours / found["peak_bytes"]))
    title = document["device"]["name"]
    return {
        f"bench_time_{stem(document)}.svg": _dots(times, f"Our time over theirs, {title}"),
        f"bench_memory_{stem(document)}.svg": _dots(memory, f"Our peak over theirs, {title}"),
    }


def _dots(points: Sequence[tuple[str, str, float]], title: str) -> bytes:
    """A row for each case, a dot for each other run, a line at 1."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise BenchError("figures need matplotlib: pip install matplotlib") from None
    cases = list(dict.fromkeys(name for name, _, _ in points))
    runs = list(dict.fromkeys(run for _, run, _ in points))
    # Fixed identifiers, no date, text left to the reader's fonts: the same bytes each time.
    style = {"svg.hashsalt": "varstream", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.5, 1.4 + 0.24 * max(len(cases), 1)), layout="constrained")
        axes = figure.add_subplot()
        for number, run in enumerate(runs):
            own = [(cases.index(name), value) for name, r, value in points if r == run]
            axes.plot(
                [value for _, value in own],
                [row for row, _ in own],
                linestyle="none",
                marker=MARKERS[(number // len(COLORS) + number) % len(MARKERS)],
                color=COLORS[number % len(COLORS)],
                markersize=5,
                label=run,
            )
        axes.axvline(1.0, color="#666666", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yticks(range(len(cases)), cases)
        axes.invert_yaxis()
        axes.grid(axis="x", which="both", linewidth=0.3, color="#cccccc")
        axes.set_xlabel("ratio; left of 1 ours is better")
        axes.set_title(title)
        if runs:
            figure.legend(loc="outside lower center", ncols=4, frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def write(path: Path, content: str | bytes) -> None:
    """Write one file; a folder that can't be written is the caller's mistake."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror or error}") from None
