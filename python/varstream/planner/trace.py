"""What a streamed function allocates, as a trace reads it off the function's own code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Moments of a streamed function, in order.
FORWARD, PROJECT, RECOMPUTE, BACKWARD = "forward", "K and V", "recomputation", "backward"
ATTENTION, ATTENTION_BACKWARD = "attention", "attention's backward"


class UntraceableError(ValueError):
    """What runs can't be run on shapes alone."""


class Line(NamedTuple):
    """Bytes at a moment: ``constant + n * row + c * chunk_row``."""

    name: str
    constant: float
    row: float
    chunk_row: float

    @property
    def kind(self) -> str:
        """Attention allocates more inside its operators than a trace sees."""
        return self.name if self.name in (ATTENTION, ATTENTION_BACKWARD) else ""

    def above(self, held: Sequence[float]) -> Line:
        """Without what lived before."""
        return Line(self.name, *(mine - old for mine, old in zip(self[1:], held, strict=True)))

    def covers(self, other: Line) -> bool:
        """Never below the other one."""
        pairs = zip(self[1:], other[1:], strict=True)
        return self.kind == other.kind and all(mine >= theirs for mine, theirs in pairs)


@dataclass(frozen=True)
class AttentionShape:
    """An attention as it was called."""

    heads: int  # Hq
    kv_heads: int  # Hkv
    head_dim: int  # D
    value_dim: int  # Dv
    window: int  # keys before its own that a row sees, -1 for all
    softcap: float
    dropout: float

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K and V of a row."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def plain(self) -> bool:
        """Nothing between q k and the softmax, see ``reference.attention.Options.plain``."""
        return self.softcap == 0 and self.dropout == 0


@dataclass(frozen=True)
class Trace:
    """The moments of a streamed function that can be its peak."""

    forward: tuple[Line, ...]
    single: tuple[Line, ...]  # the backward of one chunk; n = c, the multiples are those of n
    later: tuple[Line, ...]  # of several, whose parameter gradients are summed
    attention: AttentionShape | None = None


def upper(lines: Iterable[Line]) -> tuple[Line, ...]:
    """The lines that can be the largest; of equal ones the first."""
    kept: list[Line] = []
    for line in lines:
        if not any(other.covers(line) for other in kept):
            kept = [other for other in kept if not line.covers(other)] + [line]
    return tuple(kept)
