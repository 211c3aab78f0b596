"""``varstream verify``: is streaming exact for the model of this config.json?"""

from __future__ import annotations

import json
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from varstream.cli.config import WHERE, read_config
from varstream.cli.errors import LARGEST_INT, UserError
from varstream.streaming.structure import UnsupportedModelError
from varstream.testing.verify import SHORT, TOKENS, TOLERANCE, ConfigError, Verification, verify

INEXACT = 1

app = typer.Typer(add_completion=False)


@app.command("verify")
def command(
    config: str = typer.Argument(metavar="CONFIG", help=WHERE),
    tokens: int = typer.Option(TOKENS, min=sum(SHORT) + 2, help="Tokens of the packed row."),
    chunk_size: int = typer.Option(
        None,
        min=1,
        max=LARGEST_INT,
        help="Rows of a chunk.",
        show_default="1, 7, 16 and the whole row",
    ),
    seed: int = typer.Option(0, min=0, max=LARGEST_INT, help="Seed of weights and tokens."),
    tolerance: float = typer.Option(
        TOLERANCE, min=0.0, max=1.0, help="Largest relative difference that counts as exact."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print plain JSON instead of a table."),
) -> None:
    """Check that your model's streamed gradients are exact, on a small copy of it.

    The copy keeps the architecture and has random float64 weights; packed and padded batches of
    awkward lengths run dense and streamed. Exit code 0: exact, 1: not.
    """
    ours = read_config(config)
    torch.set_num_threads(1)  # tensors are tiny: threads would only wait for each other
    try:
        with _progress() as advance:
            report = verify(
                ours,
                tokens=tokens,
                chunk_size=chunk_size,
                seed=seed,
                tolerance=tolerance,
                progress=advance,
            )
    except (UnsupportedModelError, ConfigError) as error:
        raise UserError(f"{config}: {error}") from error
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        show(report, config)
    raise typer.Exit(0 if report.exact else INEXACT)


class _progress:
    """A bar on stderr while a terminal is there to see it; gone when done."""

    def __enter__(self) -> Any:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
        self.bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self.bar.start()
        task = self.bar.add_task("the model", total=None)

        def advance(what: str, done: int, total: int) -> None:
            self.bar.update(task, description=what, completed=done, total=total)

        return advance

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def show(report: Verification, name: str) -> None:
    """Print the report: what was checked, a table of parameters, the verdict."""
    console = Console()

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    say(f"{name}: {report.model_type}, a small float64 copy with random weights")
    shrunk = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in report.shrunk.items())
    say(f"shrunk: {shrunk or 'nothing'}")
    say(f"kept: {', '.join(report.kept)}")
    say(f"documents: {', '.join(map(str, report.lengths))} tokens, packed and padded")
    table = Table(
        title=f"Worst relative difference of each gradient, streamed against dense, in "
        f"{len(report.cases)} runs",
        title_justify="left",
        caption="run: form of the batch, rows of a chunk",
        caption_justify="left",
    )
    table.add_column("parameter", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("worst", justify="right", no_wrap=True)
    table.add_column("in run", overflow="fold")
    for parameter, found in report.gradients.items():
        shape = "x".join(map(str, report.shapes[parameter]))
        style = "bold red" if found.error > report.tolerance else ""
        short = parameter.removeprefix("model.").removesuffix(".weight")
        table.add_row(short, shape, f"{found.error:.1e}", found.case, style=style)
    table.add_section()
    table.add_row("(the loss)", "", f"{report.loss.error:.1e}", report.loss.case)
    console.print(table)
    where, worst = report.worst
    if report.exact:
        say(f"exact: worst {worst.error:.1e} <= {report.tolerance:g} ({where})", "bold green")
    else:
        say(
            f"NOT exact: worst {worst.error:.1e} > {report.tolerance:g} ({where}; {worst.case})",
            "bold red",
        )
