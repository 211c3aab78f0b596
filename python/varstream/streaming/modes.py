"""How a layer's modules are switched: training mode, PEFT's adapters. A recomputation must find
them as the forward did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_SWITCHES = ("training", "_disable_adapters", "_active_adapter")


class Modes:
    """The switches of a module and of those in it, as they are now; None has none."""

    def __init__(self, module: nn.Module | None) -> None:
        found = () if module is None else module.modules()
        self.saved = [(m.__dict__, _switches(m.__dict__)) for m in found]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within, the switches are as they were; afterwards as they were found."""
        now = [(home, _switches(home)) for home, _ in self.saved]
        try:
            for home, switches in self.saved:
                home.update(switches)
            yield
        finally:
            for home, switches in now:
                home.update(switches)


def _switches(home: dict[str, Any]) -> dict[str, Any]:
    return {name: home[name] for name in _SWITCHES if name in home}
