"""Runs one case: check, memory, warm-up, paired rounds, bars."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from varstream.testing import peak_memory, relative_error

from . import timers
from .case import OURS, Case, Setup, tensors
from .environment import environment, load

Say = Callable[[str], None]
SECONDS_OF_ROUNDS = 20.0
SECONDS_OF_BARRED_ROUNDS = 15.0  # all barred cases together stay under a quarter of an hour


@dataclass(frozen=True)
class Options:
    """How a case is run.

    Attributes:
        rounds: of timing; None takes as many as fit into about 20 seconds, 3 to 15 (CUDA: 10 to
            100; a slow case 2).
        quick: tiny sizes, two rounds, no bars: shows that a case works, says nothing about speed.
        barred: only what the bars compare is measured, for about 15 seconds.
    """

    device: torch.device
    rounds: int | None = None
    quick: bool = False
    barred: bool = False


class CheckFailed(Exception):
    """Our result is wrong, or there is none."""


def run_case(case: Case, options: Options, say: Say = lambda phase: None) -> dict[str, Any]:
    """The entry of one case; ``status`` is ``failed``, and nothing was timed, where our result
    isn't the reference's."""
    where = environment(options.device)
    entry: dict[str, Any] = {
        "op": case.op,
        "shape": case.sizes(options.quick),
        "dtype": case.dtype,
        "quick": options.quick,
        "status": "ok",
        "failure": None,
        "reference": case.reference or None,
        "tolerance": case.tolerance,
        "rounds": 0,
        "runs": {},
        "unavailable": {},
        "figures": {},
        "bars": {},
        "note": case.note,
        "environment": where,
    }
    try:
        _measure(case, options, entry, say)
    except Exception as error:  # an operator that raises is a result too: the other cases go on
        text = str(error) if isinstance(error, CheckFailed) else _reason(error)
        entry |= {"status": "failed", "failure": text, "runs": {}, "rounds": 0, "figures": {}}
    if not options.quick:
        entry["bars"] = judged(case, entry)
    where["load_after"] = load()
    gc.collect()
    return entry


def _measure(case: Case, options: Options, entry: dict[str, Any], say: Say) -> None:
    """Fill ``entry`` with what the case reaches."""
    sizes, device = case.sizes(options.quick), options.device
    say("operands")
    setup = case.build(sizes, device, 0)
    names, unavailable = _available(case, options, setup)
    checked = _check(case, setup, names, unavailable, device, say)
    names = [name for name in names if name not in unavailable]
    copies = [setup]
    for seed in range(1, timers.rotations(setup.operand_bytes, device)):
        copies.append(case.build(sizes, device, seed))
    peaks = checked.peaks
    roles = {peer.name: peer.role for peer in case.peers} | {OURS: "ours"}
    measured = [n for n in names if roles[n] != "floor"]
    if options.barred:  # memory too only where a bar compares it
        weighed = {bar.run for bar in case.bars if bar.metric.startswith("memory/")}
        measured = [n for n in measured if n == OURS or n in weighed]
    if case.memory and not case.slow:
        for name in measured:
            say(f"memory of {name}")
            peaks[name] = peak_memory(setup.runs[name], device)
    runs = {name: [c.runs[name] for c in copies] for name in names}
    for name in names:  # ours and the peers have run before, except on the rotating copies
        say(f"warm-up of {name}")
        for call in runs[name] if roles[name] == "floor" else runs[name][1:]:
            call()
    gc.collect()
    limits = {"least": 2, "most": 2} if case.slow else {}
    if device.type == "cuda":
        limits = {"least": 10, "most": 100}
    rounds = options.rounds or (2 if options.quick else None)
    seconds = timers.paired(
        runs,
        timers.timer_of(device),
        rounds=rounds,
        budget=SECONDS_OF_BARRED_ROUNDS if options.barred else SECONDS_OF_ROUNDS,
        progress=lambda done: say(f"round {done}"),
        **limits,
    )
    for name, scale in setup.scales.items():
        if name in seconds:
            seconds[name] = [value * scale for value in seconds[name]]
    entry["rounds"] = len(seconds[OURS])
    entry["unavailable"] = unavailable
    if setup.figures:
        entry["figures"] = dict(setup.figures(peaks, checked.ours))
    if setup.flops:
        entry["figures"] |= rates(setup.flops, seconds)
    for name in names:
        entry["runs"][name] = {
            "role": roles[name],
            "scale": setup.scales.get(name, 1.0),
            "error": checked.errors.get(name),
            "seconds": timers.summary(seconds[name]),
            "ratio": None if name == OURS else timers.ratio(seconds, OURS, name),
            "peak_bytes": peaks.get(name),
        }


def rates(flops: float, seconds: timers.Seconds) -> dict[str, float]:
    """TFLOP/s of every run by its median time: ``tflops`` of ours, ``tflops/<run>`` of the others.

    A floor's time has been scaled to the operations of the case: its figure is its own rate.
    """
    medians = {name: timers.summary(values)["median"] for name, values in seconds.items()}
    return {
        "tflops" if name == OURS else f"tflops/{name}": flops / median / 1e12
        for name, median in medians.items()
    }


def _available(case: Case, options: Options, setup: Setup) -> tuple[list[str], dict[str, str]]:
    """Names of the runs to take, ours first, and the reasons why others are left out."""
    unavailable: dict[str, str] = {}
    compared = {bar.run for bar in case.bars}
    for name, why in case.availability(options.device.type).items():
        if why is None and options.barred and name not in compared:
            why = "left out: no bar compares with it"
        if why is not None:
            unavailable[name] = why
    peers = [peer.name for peer in case.peers if peer.name not in unavailable]
    for name in peers:
        if name not in setup.runs:
            raise CheckFailed(f"the case has no run {name!r}")
    return [OURS, *peers], unavailable


@dataclass
class Checked:
    """What the check found: errors by run, peak bytes by run (slow cases), our own result."""

    errors: dict[str, float]
    peaks: dict[str, int]
    ours: Any


def _check(
    case: Case,
    setup: Setup,
    names: Iterable[str],
    unavailable: dict[str, str],
    device: torch.device,
    say: Say,
) -> Checked:
    """Compare ours and every peer with the reference, before anything is timed.

    A peer that raises or is wrong is moved to ``unavailable`` with the reason; ours fails the case.
    """
    floors = {peer.name for peer in case.peers if peer.role == "floor"}
    checked = Checked({}, {}, None)
    held = case.slow and case.memory  # its memory is measured in the run that is checked

    def result_of(name: str) -> Any:
        kept: list[Any] = []

        def call() -> Any:
            kept[:] = [setup.runs[name]()]
            return kept[0]

        say(f"check of {name}")
        if held:
            checked.peaks[name] = peak_memory(call, device)
        else:
            call()
        return kept[0]

    def compared(name: str, value: Any) -> list[torch.Tensor]:
        found = setup.results.get(name, tensors)(value)
        return [t.detach().clone() if held else t.detach() for t in found]

    known: dict[str, Any] = {}
    if setup.verify is None:
        known[case.reference] = compared(case.reference, result_of(case.reference))
    for name in names:
        if name in floors:
            continue
        try:
            if name in known:
                checked.errors[name] = 0.0
                continue
            value = result_of(name)
            if setup.verify is not None:
                error = setup.verify(value)
            else:
                error = _worst(compared(name, value), known[case.reference])
        except Exception as raised:
            if name == OURS:
                raise
            unavailable[name] = _reason(raised)
            continue
        if not error <= case.tolerance:
            what = f"relative error {error:.1e} against {case.reference} exceeds {case.tolerance}"
            if name == OURS:
                raise CheckFailed(what)
            unavailable[name] = what
            continue
        checked.errors[name] = error
        if name == OURS:
            checked.ours = value
    return checked


def _worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Greatest relative error of a list of tensors."""
    errors = [
        relative_error(ours, theirs.to(ours.device))
        for ours, theirs in zip(found, expected, strict=True)
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def _reason(error: Exception) -> str:
    """An exception as one short line."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0].strip()}".removesuffix(": ")
    return text if len(text) <= 200 else text[:197] + "..."


def judged(case: Case, entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each bar of this device beside what was reached; null where it wasn't measured."""
    bars = {}
    name = entry["environment"]["device"]["name"]
    for bar in (bar for bar in case.bars if bar.device in name):
        reached = metric(entry, bar.metric)
        holds = None if reached is None else reached <= bar.limit
        if entry["status"] == "failed":
            holds = False
        bars[bar.metric] = {"limit": bar.limit, "reached": reached, "holds": holds}
    return bars


def metric(entry: Mapping[str, Any], name: str) -> float | None:
    """The value of a bar's metric in an entry, None where it isn't there."""
    runs = entry["runs"]
    ours = runs.get(OURS)
    kind, _, run = name.partition("/")
    if ours is None:
        return None
    if name == "seconds":
        return float(ours["seconds"]["median"])
    if kind == "time":
        return float(runs[run]["ratio"]["median"]) if run in runs else None
    if kind == "memory":
        theirs = runs.get(run, {}).get("peak_bytes")
        return ours["peak_bytes"] / theirs if theirs and ours["peak_bytes"] is not None else None
    return entry["figures"].get(name)
