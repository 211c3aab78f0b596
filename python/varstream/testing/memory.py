"""Peak memory of a call, exact on every device: allocator events on the CPU, allocator statistics
on CUDA."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(call: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes by which ``call`` raises the allocated tensor memory at its worst moment.

    What was allocated before the call doesn't count, what the call itself returns does. On the CPU
    the profiler reports every allocation and release of torch's allocator, temporaries inside
    operators included.
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
    # torch's profiler would announce every start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = call()
    del kept
    results = prof.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    running = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        running += change
        peak = max(peak, running)
    return peak
