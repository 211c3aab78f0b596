"""The largest document under a memory budget, found by measuring.

Lengths are chosen by interpolation, but a result always stands on two runs: the length that fits
and the next one that doesn't (or the cap).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Search:
    """Measured peaks of one method.

    Attributes:
        largest: longest length that fits, 0 when not even one ``step`` does.
        capped: ``largest`` is the cap, so longer ones may fit too.
        peaks: bytes by length, every measured point.
    """

    largest: int = 0
    capped: bool = False
    peaks: dict[int, int] = field(default_factory=dict)

    def result(self) -> str:
        """The largest length as people read it, honest about the cap and about finding none."""
        if self.largest == 0:
            return f"< {min(self.peaks):,}"
        return f"{'>= ' if self.capped else ''}{self.largest:,}"

    def curve(self) -> list[tuple[int, int]]:
        """(length, bytes) in order of length."""
        return sorted(self.peaks.items())


def largest_under(measure: Callable[[int], int], budget: int, step: int, cap: int) -> Search:
    """Longest multiple of ``step``, at most ``cap``, with ``measure(length) <= budget``.

    Args:
        measure: length to peak bytes; taken to grow with the length.
        budget: bytes.
        step: lengths tried are multiples of this; ``cap`` must be one.
    """
    if step < 1 or cap < step or cap % step:
        raise ValueError(f"cap must be a positive multiple of step={step}, got {cap}")
    found = Search()

    def peak(length: int) -> int:
        if length not in found.peaks:
            found.peaks[length] = measure(length)
        return found.peaks[length]

    fits, over = 0, step
    while peak(over) <= budget:
        fits = over
        if fits == cap:
            found.largest, found.capped = cap, True
            return found
        over = min(_beyond(found.peaks, fits, budget, step), 2 * fits, cap)
    tries = 0
    while over - fits > step:
        guess = _between(found.peaks, fits, over, budget) if tries < 4 else (fits + over) // 2
        guess = min(max(guess // step * step, fits + step), over - step)
        if peak(guess) <= budget:
            fits = guess
        else:
            over = guess
        tries += 1
    found.largest = fits
    return found


def _beyond(peaks: dict[int, int], fits: int, budget: int, step: int) -> int:
    """A length that should take a tenth more than the budget, going on as the last points do."""
    before = max((length for length in peaks if length < fits), default=None)
    if before is None or peaks[fits] <= peaks[before]:
        return 2 * fits
    slope = (peaks[fits] - peaks[before]) / (fits - before)
    wanted = fits + (1.1 * budget - peaks[fits]) / slope
    return max(int(wanted) // step * step, fits + step)


def _between(peaks: dict[int, int], fits: int, over: int, budget: int) -> int:
    """Where a straight line between the nearest points meets the budget."""
    if fits == 0:
        return over // 2
    slope = (peaks[over] - peaks[fits]) / (over - fits)
    return fits + int((budget - peaks[fits]) / slope)
