"""peak_memory: exact bytes, and what it does where the profiler loses allocations."""

import gc

import pytest
import torch

from varstream.testing import memory, peak_memory


def test_bytes_at_the_worst_moment():
    def call():
        x = torch.zeros(1000, dtype=torch.float64)  # 8000
        y = x * 2  # 16000
        del x
        return torch.cat([y, y])  # 24000, then y goes

    assert peak_memory(call) == 24000


def test_nothing_allocated():
    assert peak_memory(lambda: None) == 0


def test_garbage_of_before_does_not_hide_memory():
    def call():
        gc.collect()  # as the interpreter may at any moment
        return torch.zeros(1000)

    kept = []
    peak_memory(lambda: kept.append(torch.zeros(100_000)))  # the profiler knows its size from now
    cycle = [kept.pop()]
    cycle.append(cycle)
    del cycle
    assert peak_memory(call) == 4000
    assert gc.isenabled()


def test_lost_allocations_are_noticed_and_the_call_repeated(monkeypatch):
    calls = []

    class Losing(memory.profile):  # a profiler that misses all but one event in its first run
        def __exit__(self, *args):
            super().__exit__(*args)
            if len(calls) == 1:
                events = self.profiler.kineto_results.events()
                lost = type("Results", (), {"events": lambda _: events[:1]})()
                self.profiler = type("Profiler", (), {"kineto_results": lost})()

    monkeypatch.setattr(memory, "profile", Losing)
    assert peak_memory(lambda: calls.append(torch.ones(100))) == 400
    assert len(calls) == 2


def test_always_losing_is_an_error(monkeypatch):
    monkeypatch.setattr(memory, "_allocations", lambda call: None)
    with pytest.raises(RuntimeError, match="lost allocations in 3 runs"):
        peak_memory(lambda: None)
