"""``varstream demo``: options, and what the user sees when something goes wrong."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from varstream.cli.errors import INTERRUPTED, LARGEST_INT, UserError
from varstream.demo.progress import Report
from varstream.demo.settings import DemoError, Settings
from varstream.demo.store import Store

REQUIRED = ("transformers", "tokenizers", "matplotlib")

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    data: Path = typer.Option(  # noqa: B008 - typer's way to declare an option
        None, help="Text file or folder of text files; default: Python's standard library."
    ),
    out: Path = typer.Option("demo_results", help="Folder for tables and figures."),  # noqa: B008
    steps: int = typer.Option(
        None, min=1, help="Training steps.", show_default=str(Settings.steps)
    ),
    seed: int = typer.Option(
        Settings.seed, min=0, max=LARGEST_INT, help="Seed of weights and data order."
    ),
    budget: int = typer.Option(
        None,
        min=1,
        help="Memory budget of the largest document, MiB.",
        show_default=f"{Settings.budget}, on a GPU {Settings().on_gpu().budget}",
    ),
    quick: bool = typer.Option(
        False, "--quick", help="Everything tiny, in seconds; too small to show the memory gain."
    ),
) -> None:
    """Train a small model on real documents and compare memory, speed and gradients."""
    store = None
    try:
        given = {"data": data, "out": out, "steps": steps, "seed": seed, "budget": budget}
        settings = _settings(quick, {k: v for k, v in given.items() if v is not None})
        _check_packages()
        store = Store(out)
        from varstream.demo.run import run

        run(settings, store, Report())
    except DemoError as error:
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        Console(soft_wrap=True).print(
            f"\nInterrupted. {_kept(store)}", highlight=False, markup=False
        )
        raise typer.Exit(INTERRUPTED) from None


def _settings(quick: bool, given: dict[str, Any]) -> Settings:
    """The sizes for this device, with what the user chose on top."""
    settings = Settings()
    if quick:
        settings = settings.quick()
    elif torch.cuda.is_available():
        settings = settings.on_gpu()
    return replace(settings, **given)


def _check_packages() -> None:
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise DemoError(f"needs {' and '.join(missing)}: pip install {names}")


def _kept(store: Store | None) -> str:
    """What an interrupted run leaves behind."""
    if store is None or not store.written:
        return "Nothing new was written; results of earlier runs are untouched."
    names = ", ".join(store.written)
    return f"Kept in {store.folder}: {names}. Files of earlier runs not named are untouched."
