"""``varstream bench``: hands its arguments to the benchmarks, which live in the source checkout."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from varstream.cli import errors

INSTALLED = "varstream.bench"

app = typer.Typer(add_completion=False)


def find_benchmarks() -> Any:
    """The benchmarks' command line: the installed one, else that of a checkout we stand in.

    Raises:
        UserError: there is neither.
    """
    if find_spec(INSTALLED) is not None:
        return importlib.import_module(f"{INSTALLED}.__main__")
    here = Path.cwd()
    # Someone else's package `bench` must not run: the checkout also holds our sources.
    if not ((here / "bench/__main__.py").is_file() and (here / "python/varstream").is_dir()):
        raise errors.UserError(
            "the benchmarks live in varstream's source checkout; "
            "run this in its root folder, or there: python -m bench"
        )
    sys.path.insert(0, str(here))
    return importlib.import_module("bench.__main__")


@app.command(add_help_option=False, context_settings=errors.PASSED_ON)
def bench(context: typer.Context) -> None:
    """List, run, compare and report the benchmarks of the source checkout."""
    module = find_benchmarks()
    if isinstance(getattr(module, "app", None), typer.Typer):
        command = get_command(module.app).main
    else:
        command = _without_options(module.main)
    raise typer.Exit(errors.run(command, context.args, "varstream bench"))


def _without_options(main: Callable[[list[str]], Any]) -> Callable[..., Any]:
    """A plain ``main(args)`` in the form of a click command's."""
    return lambda args, **_: main(args)
