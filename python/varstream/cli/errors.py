"""How every command reports bad input: one line on stderr, what is wrong and what to do; exit
code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

BAD_INPUT = 2
INTERRUPTED = 130  # what shells use for SIGINT
LARGEST_INT = 2**63 - 1  # what torch takes: 64 bits

# Context settings of a command whose arguments another one reads, whatever they are.
PASSED_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
}

# typer carries a click of its own or uses the installed one, by version; this finds either's base.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


class UserError(Exception):
    """What the user asked for can't be done. The message is one line: what is wrong; what to do."""


def run(command: Callable[..., Any], args: Sequence[str] | None, name: str) -> int:
    """Run a click command's ``main`` and return the exit code.

    Args:
        command: ``typer.main.get_command(app).main``, or what takes its arguments.
        args: the command line after the command's name; None for the process's own.
        name: the command as the user wrote it, such as ``"varstream demo"``.

    Exit codes that a command chooses are kept, and so are the tracebacks of unexpected errors.
    """
    try:
        code = command(
            args=None if args is None else list(args), prog_name=name, standalone_mode=False
        )
    except UserError as error:
        return complain(name, str(error))
    except _ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else name
        return complain(path, f"{_plain(error)}; try: {path} --help")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def complain(name: str, message: str) -> int:
    """Print ``name: message`` as one line on stderr; returns the exit code of bad input."""
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _plain(error: Any) -> str:
    """click's sentence as the middle of ours: no capital, no full stop."""
    text = error.format_message().strip().removesuffix(".")
    return text[:1].lower() + text[1:]
