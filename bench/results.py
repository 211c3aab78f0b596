"""Result documents: one JSON file for each device, one entry for each case, checked on every read
and write against ``schema.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from varstream.cli.errors import UserError

HERE = Path(__file__).parent
RESULTS = HERE / "results"
VERSION = 1
WANTED = "give bench/results/<device>.json, written by python -m bench run"

Document = dict[str, Any]


class BenchError(UserError):
    """A mistake in the call or in a file: one line, exit code 2."""


@cache
def _validator() -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        raise BenchError("the benchmarks need jsonschema: pip install jsonschema") from None
    schema = json.loads((HERE / "schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def validate(document: Any, where: str) -> Document:
    """The document itself if it keeps to the schema and each entry is of the document's device.

    Raises:
        BenchError: it doesn't; names the place and what is wrong there.
    """
    errors = sorted(_validator().iter_errors(document), key=lambda e: (len(e.path), e.json_path))
    if errors:
        first = errors[0]
        while first.context:  # the alternatives of a oneOf: the deepest says most
            first = max(first.context, key=lambda e: len(e.path))
        message = " ".join(first.message.split())
        if len(message) > 160:  # the message holds the value; the rule alone says enough
            message = f"breaks the rule {first.validator}: {first.validator_value}"
        raise BenchError(f"{where}: {first.json_path}: {message}")
    for name, entry in document["cases"].items():
        if entry["environment"]["device"] != document["device"]:
            raise BenchError(f"{where}: {name} was measured on another device than the file names")
    return document


def load(path: Path) -> Document:
    """Read and check one file.

    Raises:
        BenchError: no such file, no JSON, or not of the schema.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror or error}; {WANTED}") from None
    except UnicodeDecodeError:
        raise BenchError(f"{path}: not JSON: not UTF-8 text; {WANTED}") from None
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise BenchError(f"{path}: not JSON: {error}; {WANTED}") from None
    _validator()  # a missing package is not the file's fault
    try:
        return validate(document, str(path))
    except BenchError as error:
        raise BenchError(f"{error}; {WANTED}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def document_of(device: Mapping[str, Any], cases: Mapping[str, Any]) -> Document:
    """A document of entries measured on one device."""
    return {"schema": VERSION, "device": dict(device), "cases": dict(cases)}


def merged(old: Document | None, new: Document) -> Document:
    """``old`` with the cases of ``new`` in place of its own; cases sorted by name.

    Raises:
        BenchError: the two are of different devices.
    """
    if old is not None and old["device"] != new["device"]:
        names = [f"{d['device']['name']} ({d['device']['cores']} cores)" for d in (old, new)]
        raise BenchError(f"results of {names[0]} can't be mixed with those of {names[1]}")
    cases = {**(old["cases"] if old else {}), **new["cases"]}
    return document_of(new["device"], dict(sorted(cases.items())))


def store(path: Path, new: Document) -> Document:
    """Merge ``new`` into the file, which is replaced as a whole or not at all."""
    document = merged(load(path) if path.exists() else None, validate(new, "new results"))
    text = json.dumps(validate(document, str(path)), indent=2, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror or error}") from None
    return document


def committed() -> list[Path]:
    """The files under ``results/``, by name."""
    return sorted(RESULTS.glob("*.json"))
