"""Command line: ``varstream info | demo | plan | verify | bench``.

A command's options live in ``varstream.cli.<command>``, as its typer ``app``; that module is
imported when the command runs, so none pays for another's imports.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

import varstream
from varstream.cli import errors


class _Commands(TyperGroup):
    """The group of commands; its usage errors are one line like everyone's."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> Any:
        given = sys.argv[1:] if args is None else args
        sys.exit(errors.run(super().main, given or ["--help"], "varstream"))


app = typer.Typer(
    name="varstream",
    cls=_Commands,
    help="Train transformers on real tokens only, and on long sequences in little memory.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"varstream {varstream.__version__}")
        raise typer.Exit


@app.callback()
def _varstream(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Without a command, the help."""


def _forward(name: str, summary: str) -> None:
    """Register the command of ``varstream.cli.<name>``, which reads its own options."""

    @app.command(name, help=summary, add_help_option=False, context_settings=errors.PASSED_ON)
    def run(context: typer.Context) -> None:
        module = importlib.import_module(f"varstream.cli.{name}")
        command = get_command(module.app).main
        raise typer.Exit(errors.run(command, context.args, f"varstream {name}"))


_forward("info", "Show versions, the build, devices and what works here.")
_forward("demo", "Train a small model on real documents and compare memory, speed and gradients.")
_forward("plan", "Predict a training step's peak memory and choose chunks for a budget.")
_forward("verify", "Check that your model's streamed gradients are exact, on a small copy of it.")
_forward("bench", "List, run, compare and report the benchmarks of the source checkout.")


def main() -> None:
    """Entry point of the ``varstream`` script."""
    app()
