"""Random numbers of a recomputation: the same as the first time, and the caller's generators as if
nothing had been drawn again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The states of torch's global generators, of the CPU and of some devices.

    They live on the host, so reading them waits for nothing.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        own = [d for d in dict.fromkeys(devices) if d.type not in ("cpu", "meta")]
        self.others = [(d, torch.get_device_module(d).get_rng_state(d)) for d in own]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def random_state_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Whatever is drawn inside, the generators are as before afterwards."""
    before = RandomState(devices)
    try:
        yield
    finally:
        before.restore()
