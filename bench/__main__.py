"""``python -m bench``: list, run, compare, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from varstream.cli import errors

app = typer.Typer(
    name="bench",
    help="Measure varstream against its peers and floors; every result is checked first.",
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _bench() -> None:
    """Without a command, the help."""


def _device(name: str) -> Any:
    """The torch device of ``--device``."""
    import torch

    from .results import BenchError

    if name not in ("cpu", "cuda"):
        raise BenchError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: no CUDA device here")
    return torch.device(name)


def _chosen(patterns: list[str] | None, device: str, barred: bool) -> list[Any]:
    """The cases that match and run on this kind of device."""
    from .cases import matching
    from .results import BenchError

    found = [
        case
        for case in matching(patterns or [])
        if device in case.devices and (case.bars or not barred)
    ]
    if not found:
        asked = " ".join(patterns or ["the declared cases"])
        raise BenchError(f"none of {asked} runs on {device}{' and has a bar' if barred else ''}")
    return found


Patterns = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PATTERN]...", help="Topics or names of cases, with * and ?; all without any."
    ),
]


@app.command("list")
def list_cases(
    pattern: Patterns = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
    device: Annotated[str, typer.Option(help="Only cases of this device: cpu or cuda.")] = "",
    names: Annotated[bool, typer.Option("--names", help="Print only names, one a line.")] = False,
) -> None:
    """Show the cases: operator, shape, dtype, devices, peers (and why one can't run), bars."""
    from .cases import matching
    from .results import BenchError

    if device not in ("", "cpu", "cuda"):
        raise BenchError(f"--device must be cpu or cuda, got {device!r}")
    if names and as_json:
        raise BenchError("--names and --json exclude each other; give one")
    cases = _chosen(pattern, device, barred=False) if device else matching(pattern or [])
    if names:
        print("\n".join(case.name for case in cases))
        return
    import torch

    here = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = [_described(case, here if here in case.devices else case.devices[0]) for case in cases]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        sizes = " ".join(f"{name}={size}" for name, size in row["shape"].items())
        print(f"{row['name']}: {row['op']}, {row['dtype']}, {'/'.join(row['devices'])}")
        if sizes:
            print(f"    {sizes}")
        if row["needs"]:
            print(f"    can't run here: {row['needs']}")
        for peer, why in row["peers"].items():
            print(f"    {peer}" + (f": unavailable, {why}" if why else ""))
        for metric, limit in row["bars"].items():
            where = row["bar_devices"].get(metric)
            print(f"    bar: {metric} <= {limit:g}" + (f" on {where}" if where else ""))


def _described(case: Any, device: str) -> dict[str, Any]:
    """One case as plain data; availability is that on ``device``."""
    missing = None
    if device == "cuda":
        import torch

        missing = None if torch.cuda.is_available() else "no CUDA device here"
    return {
        "name": case.name,
        "op": case.op,
        "shape": dict(case.shape),
        "dtype": case.dtype,
        "devices": list(case.devices),
        "needs": missing or case.needs(device),
        "peers": case.availability(device),
        "bars": {bar.metric: bar.limit for bar in case.bars},
        "bar_devices": {bar.metric: bar.device for bar in case.bars if bar.device},
        "note": case.note,
    }


@app.command()
def run(
    pattern: Patterns = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds; by default what fits into 20 seconds.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to merge into; by default bench/results/<device>.json."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes; stored only with --out.")
    ] = False,
    barred: Annotated[
        bool, typer.Option("--barred", help="Cases with bars only, and only what bars compare.")
    ] = False,
) -> None:
    """Check, then time; merge the entries, case by case, into a result file. Exit code 1 if a check
    failed; a missed bar is reported and doesn't change the exit code."""
    from . import results
    from .environment import device_record, file_name

    where = _device(device)
    cases = _chosen(pattern, device, barred)
    record = device_record(where)
    path = out
    if path is None and not quick:
        folder = results.RESULTS if results.RESULTS.is_dir() else Path.cwd()
        path = folder / file_name(record)
    if path is not None and path.exists():  # a file that can't be merged into fails now, not later
        results.merged(results.load(path), results.document_of(record, {}))
    if quick:
        print("--quick: these shapes only test the runner: their ratios mean nothing", flush=True)
    failed = _run_all(cases, where, rounds, quick, barred, path, record)
    if path is not None:
        print(f"written: {path}")
    raise typer.Exit(1 if failed else 0)


def _run_all(
    cases: Sequence[Any],
    where: Any,
    rounds: int | None,
    quick: bool,
    barred: bool,
    path: Path | None,
    record: dict[str, Any],
) -> list[str]:
    """Run the cases one by one, each stored as soon as it is done; returns the failed ones."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from . import results
    from .runner import Options, run_case

    options = Options(where, rounds, quick, barred)
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            if why := case.needs(where.type):
                print(f"{case.name}: left out, {why}", flush=True)
                progress.advance(task)
                continue

            def say(phase: str, name: str = case.name) -> None:
                progress.update(task, description=f"{name}: {phase}")

            say("environment")
            entry = run_case(case, options, say)
            for line in _lines(case.name, entry):
                print(line, flush=True)  # above the bar on a terminal, else to stdout
            document = results.document_of(record, {case.name: entry})
            if path is not None:
                results.store(path, document)
            else:
                results.validate(document, case.name)
            if entry["status"] == "failed":
                failed.append(case.name)
            progress.advance(task)
    return failed


def _lines(name: str, entry: dict[str, Any]) -> list[str]:
    """What is printed of one case."""
    from .report import bytes_text, time_text

    if entry["status"] == "failed":
        return [f"{name}: FAILED, not timed: {entry['failure']}"]
    lines = [f"{name}: {entry['rounds']} rounds"]
    for run_name, found in entry["runs"].items():
        spread = found["seconds"]
        text = (
            f"  {run_name:18} {time_text(spread['median'])} "
            f"({time_text(spread['quartile_1'])} to {time_text(spread['quartile_3'])})"
        )
        if found["ratio"]:
            text += f", ours over it {found['ratio']['median']:.3f}"
        if found["peak_bytes"] is not None:
            text += f", {bytes_text(found['peak_bytes'])}"
        lines.append(text)
    lines += [f"  {run_name:18} {why}" for run_name, why in entry["unavailable"].items()]
    lines += [f"  {figure}: {value:.5g}" for figure, value in entry["figures"].items()]
    for metric, bar in entry["bars"].items():
        verdict = {True: "holds", False: "MISSED", None: "not measured"}[bar["holds"]]
        reached = "" if bar["reached"] is None else f"{bar['reached']:.5g} "
        lines.append(f"  {metric}: {reached}against {bar['limit']:g}: {verdict}")
    return lines


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Results to hold on to.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Results to judge.")],
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, help="Relative change of a time ratio that counts as the same."),
    ] = 0.05,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show what stayed the same, too.")
    ] = False,
) -> None:
    """Compare two result files: time ratios within the tolerance, memory to the byte. Exit code 1
    on a regression, 2 if there was nothing to compare."""
    from . import compare as comparison
    from .results import BenchError, load

    verdicts = comparison.compare(load(base), load(new), tolerance)
    for v in verdicts:
        if v.kind == "same" and not show_all:
            continue
        change = "" if v.change is None else f" ({v.change:+.1%})"
        values = "" if v.base is None or v.new is None else f" {v.base:.5g} -> {v.new:.5g}{change}"
        print(f"{v.case} {v.metric}: {v.kind}{values}{f', {v.why}' if v.why else ''}")
    print(comparison.totals(verdicts))
    if not comparison.compared(verdicts):
        raise BenchError(
            f"nothing was compared: {base} and {new} share no case of the same shape, dtype, "
            "threads and torch on the same device; run the same cases on it for both"
        )
    raise typer.Exit(1 if comparison.regressed(verdicts) else 0)


@app.command()
def report(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILES]...", help="Result files; those of bench/results without any."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Markdown page to write; stdout without it.")
    ] = None,
) -> None:
    """Write tables, and figures with --out, from result files."""
    import os

    from . import report as drawing
    from .results import BenchError, committed, load

    documents = [load(path) for path in files or committed()]
    if not documents:
        raise BenchError("no result files; `bench run` makes them")
    folder = None
    if out is not None:
        for document in documents:
            for name, content in drawing.figures(document).items():
                drawing.write(out / name, content)
        folder = Path(os.path.relpath(out, page.parent if page else Path.cwd())).as_posix()
    text = drawing.markdown(documents, folder)
    if page is None:
        print(text, end="")
    else:
        drawing.write(page, text)


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. A mistake in the call is one line on stderr."""
    given = sys.argv[1:] if args is None else args
    return errors.run(get_command(app).main, given or ["--help"], "bench")


if __name__ == "__main__":
    sys.exit(main())
