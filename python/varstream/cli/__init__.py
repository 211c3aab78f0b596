"""Command line: ``varstream info``, ``varstream demo``.

A command's module is imported when the command runs, so none pays for another's imports.
"""

from __future__ import annotations

import importlib

import typer

app = typer.Typer(
    name="varstream",
    help="Train transformers on real tokens only, and on long sequences in little memory.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def info(
    json: bool = typer.Option(False, "--json", help="Print plain JSON instead of a table."),
) -> None:
    """Show versions, the build, devices and what works here."""
    from varstream.cli.info import show

    show(as_json=json)


def _forward(name: str, summary: str) -> None:
    """Register a command whose options live in ``varstream.cli.<name>``, as its typer ``app``."""

    @app.command(
        name,
        help=summary,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def run(context: typer.Context) -> None:
        module = importlib.import_module(f"varstream.cli.{name}")
        module.app(args=context.args, prog_name=f"varstream {name}")


_forward("demo", "Train a small model on real documents and compare memory, speed and gradients.")


def main() -> None:
    """Entry point of the ``varstream`` script."""
    app()
