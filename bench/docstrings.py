"""Real texts of very different lengths: the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Tests and applications that not every installation has.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


@cache
def docstrings() -> tuple[str, ...]:
    """Every docstring of the standard library once, about 7000, in an order that has nothing to do
    with lengths and is the same at every call (not for every version of Python)."""
    texts = sorted({text for path in _files() for text in _of_file(path)})
    random.Random(0).shuffle(texts)
    return tuple(texts)


def _files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not _LEFT_OUT.intersection(path.relative_to(root).parts)
    ]


def _of_file(path: Path) -> Iterator[str]:
    """The docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text
