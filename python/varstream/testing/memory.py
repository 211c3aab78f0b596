"""Peak memory of a call, exact on every device: allocator events on the CPU, allocator statistics
on CUDA."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_MARKER = 54_321  # bytes, a size nothing else has
_ATTEMPTS = 3


def peak_memory(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes by which ``call`` raises the allocated tensor memory at its worst moment.

    What was allocated before the call doesn't count, what the call itself returns does. On the CPU
    the profiler reports every allocation and release of torch's allocator, temporaries inside
    operators included; where it lost some, the call is made again.

    Raises:
        RuntimeError: the profiler lost allocations every time.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return peak
    for _ in range(_ATTEMPTS):
        changes = _allocations(call)
        if changes is not None:
            break
    else:
        raise RuntimeError(
            f"torch's profiler lost allocations in {_ATTEMPTS} runs; is it in use elsewhere?"
        )
    running = peak = 0
    for change in changes:
        running += change
        peak = max(peak, running)
    return peak


def _allocations(call: Callable[[], Any]) -> list[int] | None:
    """Bytes allocated (positive) and released during the call, in order.

    None if the profiler lost some: a marker allocated before the call and one after it must both be
    there.
    """
    # torch's profiler would announce every start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Tensors made under an earlier profile and collected during the call would hide as much of its
    # own memory.
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            torch.empty(_MARKER, dtype=torch.uint8)
            kept = call()
            torch.empty(_MARKER, dtype=torch.uint8)
    finally:
        if collecting:
            gc.enable()
    del kept
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    marker = [_MARKER, -_MARKER]
    if changes[:2] != marker or changes[-2:] != marker or len(changes) < 4:
        return None
    return changes[2:-2]
