"""What a benchmark case is: an operator, a shape, the peers and floors beside it, its bars.

A case is declared without allocating anything, so that listing is free; ``build`` makes the
operands and one callable for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

OURS = "varstream"

Role = Literal["ours", "peer", "floor"]
# Device kind ("cpu" or "cuda") to the reason why something can't run here, None where it can.
Needs = Callable[[str], str | None]


def nothing_needed(device: str) -> str | None:
    """Runs everywhere."""
    return None


@dataclass(frozen=True)
class Peer:
    """Another way to the same result, or a floor: work that no implementation can do without."""

    name: str
    needs: Needs = nothing_needed
    role: Role = "peer"


def floor(name: str) -> Peer:
    """A floor; its run is timed beside ours, never checked."""
    return Peer(name, role="floor")


@dataclass(frozen=True)
class Bar:
    """An upper limit on one metric.

    ``time/<run>`` is our time over that run's, the median of the ratios within a round;
    ``memory/<run>`` our peak memory over that run's; ``seconds`` our median time; any other name is
    one of the case's own figures. With ``device`` it is a bar only where the device's name holds
    these words.
    """

    metric: str
    limit: float
    device: str = ""

    @property
    def run(self) -> str | None:
        """The run that the metric compares with, if any."""
        kind, _, name = self.metric.partition("/")
        return name if kind in ("time", "memory") else None


@dataclass(frozen=True)
class Setup:
    """Operands of one case, closed over by its runs.

    Attributes:
        runs: callables by name: ``varstream``, the case's peers and floors, and its reference.
        results: by run, what turns the returned value into the tensors that are compared with the
            reference's; the default takes a tensor or a sequence of tensors as it is.
        verify: for results that aren't tensors: value of a run to its error; replaces the
            comparison with the reference.
        scales: by floor, the factor from the work that the run does to the work of the case.
        figures: from peak bytes by run and our result to further numbers of the case.
        flops: operations of the task; where given, every run's rate becomes a figure.
        operand_bytes: bytes that a run reads; on CUDA, enough copies rotate to outgrow the cache.
    """

    runs: Mapping[str, Callable[[], Any]]
    results: Mapping[str, Callable[[Any], Sequence[Tensor]]] = field(default_factory=dict)
    verify: Callable[[Any], float] | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    figures: Callable[[Mapping[str, int], Any], Mapping[str, float]] | None = None
    flops: float = 0.0
    operand_bytes: int = 0


Shape = Mapping[str, int]
Build = Callable[[Shape, torch.device, int], Setup]


@dataclass(frozen=True)
class Case:
    """One line of ``python -m bench list``.

    Attributes:
        name: ``topic/variant``.
        op: the public name that is measured.
        shape: named sizes, handed to ``build(shape, device, seed)``.
        quick: the sizes that ``--quick`` replaces, to see that a case works.
        reference: name of the run whose result is right; a peer, or a run that is never timed.
        tolerance: greatest relative error of a result against the reference.
        memory: whether tensors are allocated at all.
        slow: a run takes most of a minute: results are checked in the run that measures memory,
            and two rounds are enough.
        needs: the reason why the whole case can't run here.
        note: what the reader of a table should know.
    """

    name: str
    op: str
    shape: Shape
    build: Build
    quick: Shape
    dtype: str = "float32"
    devices: tuple[str, ...] = ("cpu",)
    peers: tuple[Peer, ...] = ()
    bars: tuple[Bar, ...] = ()
    reference: str = "float64"
    tolerance: float = 1e-5
    memory: bool = True
    slow: bool = False
    needs: Needs = nothing_needed
    note: str = ""

    @property
    def topic(self) -> str:
        return self.name.partition("/")[0]

    def sizes(self, quick: bool) -> dict[str, int]:
        """The shape, or the small one."""
        return {**self.shape, **(self.quick if quick else {})}

    def availability(self, device: str) -> dict[str, str | None]:
        """Every peer and floor, with the reason why it can't run here or None."""
        return {peer.name: peer.needs(device) for peer in self.peers}


def tensors(value: Any) -> list[Tensor]:
    """A run's result as a list of tensors."""
    return [value] if isinstance(value, Tensor) else [t for t in value if t is not None]
