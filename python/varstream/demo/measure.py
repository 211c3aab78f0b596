"""Speed, memory and exactness of the compared methods, on the same documents and weights."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varstream.demo.corpus import Corpus
from varstream.demo.methods import METHODS, Documents, Method, Runner, predicted, streamed
from varstream.demo.progress import Report
from varstream.demo.search import Search, largest_under
from varstream.demo.settings import MIB, Settings
from varstream.testing import float64_twin, peak_memory, worst_gradient

FLOAT64 = Method(
    "varstream_float64", "varstream in float64", "vs.stream on the float64 twin", streamed
)


@dataclass(frozen=True)
class FirstRun:
    """One method's first forward and backward on the compared documents."""

    peak_bytes: int
    gradient_difference: float  # worst parameter, relative to dense float64


@dataclass(frozen=True)
class Speed:
    """Times of one method on the compared documents; ``tokens_per_second`` is the median's."""

    tokens_per_second: float  # real tokens
    seconds: list[float]


def first_runs(
    model: Any, runners: list[Runner], documents: Documents, report: Report
) -> dict[str, FirstRun]:
    """Peak memory and gradients of every method; this is also its warm-up.

    The gradients' reference is the model's float64 twin on every document by itself, without
    packing or padding, summed with the batch's normaliser. A last entry, ``FLOAT64``, runs
    varstream on the twin as well, to tell rounding from error.
    """
    twin = float64_twin(model)
    runs = {}
    gc.collect()
    with report.progress("memory and gradients", len(runners) + 2) as advance:
        reference = _dense_gradients(twin, documents)
        advance("reference in float64")
        for runner in [*runners, Runner(FLOAT64, twin, streamed(twin))]:
            peak = measure_peak(runner, documents)
            difference = worst_gradient(_gradients(runner.model), reference)[1]
            runner.release()
            runs[runner.method.key] = FirstRun(peak, difference)
            advance(f"{peak / MIB:,.0f} MiB, {difference:.1e}: {runner.method.name}")
    return runs


def measure_speed(
    runners: list[Runner], documents: Documents, settings: Settings, report: Report
) -> dict[str, Speed]:
    """Times of interleaved runs of all methods.

    Rounds start with another method each time, so that slow moments of the machine don't always
    meet the same one. Slow machines do fewer rounds, see ``Settings.rounds``.
    """
    tokens = sum(len(document) for document in documents)
    seconds: dict[str, list[float]] = {runner.method.key: [] for runner in runners}
    began = time.perf_counter()
    with report.progress("speed", settings.rounds * len(runners)) as advance:
        for round_ in range(settings.rounds):
            if round_ and time.perf_counter() - began > settings.speed_seconds:
                for _ in range((settings.rounds - round_) * len(runners)):
                    advance(f"{round_} rounds, then the {settings.speed_seconds:g} s limit")
                break
            for i in range(len(runners)):
                runner = runners[(i + round_) % len(runners)]
                spent = _time(runner, documents)
                seconds[runner.method.key].append(spent)
                advance(f"{tokens / spent:,.0f} tokens/s: {runner.method.name}")
    return {k: Speed(tokens / statistics.median(times), times) for k, times in seconds.items()}


def measure_peak(runner: Runner, documents: Documents) -> int:
    """Bytes that one forward and backward allocate at most, gradients (which stay) included."""
    runner.release()
    return peak_memory(lambda: runner.step(documents), runner.model.device)


def _time(runner: Runner, documents: Documents) -> float:
    device = runner.model.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    runner.step(documents)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    spent = time.perf_counter() - began
    runner.release()
    return spent


def measure_lengths(
    model: Any, corpus: Corpus, settings: Settings, report: Report
) -> dict[str, Search]:
    """Every method's peak on single documents of growing length, up to just beyond the budget."""
    found = {}
    tokens = corpus.joined(settings.length_cap).to(model.device)
    for method in METHODS:
        runner = method.prepare(model)
        gc.collect()  # models are cycles: else the last method's may be freed in the middle
        with report.progress(method.name, None) as advance:

            def measure(length: int, runner: Runner = runner, advance: Any = advance) -> int:
                peak = measure_peak(runner, [tokens[:length]])
                runner.release()
                advance(f"{length:,} tokens: {peak / MIB:,.0f} MiB")
                return peak

            search = largest_under(
                measure, settings.budget * MIB, settings.length_step, settings.length_cap
            )
            # The line that stays is the answer: the last length tried may be one too long.
            peak = f", {search.peaks[search.largest] / MIB:,.0f} MiB" if search.largest else ""
            advance(f"largest: {search.result()} tokens{peak}")
            found[method.key] = search
    return found


def _dense_gradients(twin: Any, documents: Documents) -> dict[str, Tensor | None]:
    normalizer = predicted(documents)
    for document in documents:
        ids = document[None]
        twin(input_ids=ids, labels=ids, num_items_in_batch=normalizer).loss.backward()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    twin.zero_grad(set_to_none=True)
    return gradients


def _gradients(model: Any) -> list[tuple[str, Tensor | None]]:
    return [(name, parameter.grad) for name, parameter in model.named_parameters()]
