"""Paired timing: every run takes part in every round, so a slow phase of the machine hits all.

Runs are compared by the ratio within a round, never by a ratio of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
# Seconds that one call took.
Timer = Callable[[Call], float]
Seconds = dict[str, list[float]]

# Operands of one run rotate until together they are larger than any GPU's cache.
COLD_BYTES = 512 << 20
MOST_ROTATIONS = 16
# The device waits about a millisecond before a timed call, so that the host is done launching a
# call of few kernels before the first of them starts, as in a model whose queue is full.
HEAD_START_CYCLES = 2_000_000


def wall(call: Call) -> float:
    """Seconds of one call on the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_events(call: Call) -> float:
    """Seconds of one call on the current CUDA device, between two events.

    What the host takes to launch counts only beyond its head start.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def kernel_seconds(call: Call, name: str, times: int = 10) -> float | None:
    """Mean seconds that the kernels whose names hold ``name`` take in one call on the current CUDA
    device, by torch's profiler; None where it sees none."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    return mean_seconds(profiler.key_averages(), name, times)


def mean_seconds(kernels: Iterable[Any], name: str, times: int) -> float | None:
    """Seconds a call from a profiler's averages over ``times`` calls (microseconds in all)."""
    found = [k.self_device_time_total for k in kernels if name in k.key]
    return sum(found) / times / 1e6 if sum(found) else None


def timer_of(device: torch.device) -> Timer:
    """What times a call on this device."""
    return cuda_events if device.type == "cuda" else wall


def rotations(operand_bytes: int, device: torch.device) -> int:
    """Copies of a run's operands that keep a GPU's cache cold; 1 on the CPU, where the operands
    of a layer are warm or too large in real use as well."""
    if device.type != "cuda":
        return 1
    return min(MOST_ROTATIONS, max(1, -(-COLD_BYTES // max(1, operand_bytes))))


def order(names: Sequence[str], round_: int) -> list[str]:
    """The runs in the order of one round: rotated by one each round, every second one backwards.

    Over the rounds each run comes first, last, and after each other run.
    """
    turn = (round_ // 2) % len(names)
    turned = [*names[turn:], *names[:turn]]
    return turned[::-1] if round_ % 2 else turned


def paired(
    runs: Mapping[str, Sequence[Call]],
    timer: Timer,
    *,
    rounds: int | None = None,
    budget: float = 20.0,
    least: int = 3,
    most: int = 15,
    progress: Callable[[int], None] = lambda done: None,
) -> Seconds:
    """Seconds of each run in each round.

    Args:
        runs: by name, the same call on rotating copies of its operands.
        timer: what times one call.
        rounds: how many; by default as many as start within ``budget`` seconds, between ``least``
            and ``most``.
        progress: called with the number of rounds done after each.
    """
    names = list(runs)
    seconds: Seconds = {name: [] for name in names}
    begin, done = time.perf_counter(), 0
    while done < (most if rounds is None else rounds):
        if rounds is None and done >= least and time.perf_counter() - begin > budget:
            break
        for name in order(names, done):
            seconds[name].append(timer(runs[name][done % len(runs[name])]))
        done += 1
        progress(done)
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and minimum of one value or more."""
    # A single value is its own quartiles; before Python 3.13 quantiles refuses it.
    spread = list(values) if len(values) > 1 else [*values, *values]
    low, median, high = statistics.quantiles(spread, n=4, method="inclusive")
    return {"median": median, "quartile_1": low, "quartile_3": high, "min": min(values)}


def ratio(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> dict[str, float]:
    """Summary of the per-round ratios of two runs."""
    pairs = zip(seconds[name], seconds[base], strict=True)
    return summary([ours / theirs for ours, theirs in pairs])
