"""All cases, by topic; a new topic's module is named here."""

from __future__ import annotations

from fnmatch import fnmatchcase

from ..case import Case
from ..results import BenchError
from . import (
    attention,
    attention_backward,
    attention_chunks,
    attention_forward,
    attention_options,
    batching,
    collation,
    embedding,
    encoder,
    head,
    head_peers,
    imports,
    logprobs,
    merge,
    objective_loops,
    objectives,
    packing,
    streaming,
)

TOPICS = (
    packing,
    attention,
    attention_options,
    attention_forward,
    attention_backward,
    attention_chunks,
    merge,
    head,
    head_peers,
    logprobs,
    objectives,
    objective_loops,
    encoder,
    embedding,
    streaming,
    batching,
    collation,
    imports,
)


def all_cases() -> dict[str, Case]:
    """Every declared case by name, in the order of the topics."""
    cases: dict[str, Case] = {}
    for topic in TOPICS:
        for case in topic.CASES:
            if case.name in cases:
                raise ValueError(f"two cases are named {case.name}")
            cases[case.name] = case
    return cases


def matching(patterns: list[str]) -> list[Case]:
    """Cases whose topic or name matches one of the patterns (``*`` and ``?``), all without any.

    Raises:
        BenchError: a pattern matches nothing.
    """
    cases = all_cases()
    if not patterns:
        return list(cases.values())
    chosen: set[str] = set()
    for pattern in patterns:
        found = {
            name
            for name, case in cases.items()
            if fnmatchcase(name, pattern) or fnmatchcase(case.topic, pattern)
        }
        if not found:
            raise BenchError(f"no case matches {pattern!r}; `bench list` shows them")
        chosen |= found
    return [case for name, case in cases.items() if name in chosen]
