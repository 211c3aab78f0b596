"""Two result documents, case by case: pure, so that it needs no device.

Times are compared by the ratio to a peer or floor of the same round, which a busy or slower machine
changes little; memory is compared to the byte, as it is the same on every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from .case import OURS
from .results import Document

Kind = Literal[
    "faster", "slower", "smaller", "larger", "same", "new", "missing", "failed", "incomparable"
]
REGRESSIONS = frozenset({"slower", "larger", "failed"})
ONE_SIDED = frozenset({"new", "missing", "incomparable"})  # nothing was held against anything
TOLERANCE = 0.05


class Verdict(NamedTuple):
    """What became of one metric.

    Attributes:
        case: its name.
        metric: ``time/<run>`` (our time over that run's), ``peak_bytes`` (ours), a figure that a
            bar is set on, or ``-`` for the case as a whole.
        kind: the verdict.
        base, new: the two values, None where there is none.
        why: for a case as a whole, what stands in the way.
    """

    case: str
    metric: str
    kind: Kind
    base: float | None = None
    new: float | None = None
    why: str = ""

    @property
    def change(self) -> float | None:
        """Relative change from base to new."""
        if self.base is None or self.new is None or self.base == 0:
            return None
        return self.new / self.base - 1

    @property
    def regression(self) -> bool:
        return self.kind in REGRESSIONS


def compare(base: Document, new: Document, tolerance: float = TOLERANCE) -> list[Verdict]:
    """Verdicts of all cases of either document, by name.

    Args:
        base: the document to hold on to.
        new: the document to judge.
        tolerance: the relative change of a time ratio that still counts as the same.
    """
    verdicts: list[Verdict] = []
    for name in sorted(base["cases"].keys() | new["cases"].keys()):
        old, now = base["cases"].get(name), new["cases"].get(name)
        verdicts += [Verdict(name, *rest) for rest in _case(old, now, tolerance)]
    return verdicts


def regressed(verdicts: Iterable[Verdict]) -> bool:
    """Whether anything got worse beyond the tolerance."""
    return any(v.regression for v in verdicts)


def compared(verdicts: Iterable[Verdict]) -> bool:
    """Whether anything of the one document was held against the other."""
    return any(v.kind not in ONE_SIDED for v in verdicts)


def totals(verdicts: Sequence[Verdict]) -> str:
    """How many verdicts there are of every kind, those of which there are none included."""
    found = Counter(v.kind for v in verdicts)
    counts = ", ".join(f"{found[kind]} {kind}" for kind in get_args(Kind))
    return f"{len(verdicts)} verdict{'' if len(verdicts) == 1 else 's'}: {counts}"


Entry = Mapping[str, Any]


def _case(old: Entry | None, now: Entry | None, tolerance: float) -> Iterable[tuple[Any, ...]]:
    """The verdicts of one case, without its name."""
    if old is None or now is None:
        yield "-", "new" if old is None else "missing"
        return
    if now["status"] == "failed":
        known = old["status"] == "failed"
        yield "-", "same" if known else "failed", None, None, now["failure"]
        return
    if old["status"] == "failed":
        yield "-", "new", None, None, "failed before"
        return
    if why := _difference(old, now):
        yield "-", "incomparable", None, None, why
        return
    before, after = _times(old), _times(now)
    for run in sorted(before.keys() | after.keys()):
        pair = before.get(run), after.get(run)
        yield f"time/{run}", _judged(*pair, tolerance, "faster", "slower"), *pair
    before, after = _exact(old), _exact(now)
    for metric in sorted(before.keys() | after.keys()):
        pair = before.get(metric), after.get(metric)
        yield metric, _judged(*pair, 0.0, "smaller", "larger"), *pair


def _difference(old: Entry, now: Entry) -> str:
    """What keeps two entries from being compared; empty if nothing does."""
    for what in ("shape", "dtype", "quick"):
        if old[what] != now[what]:
            return f"{what}: {old[what]} and {now[what]}"
    for what in ("device", "threads", "torch"):
        a, b = old["environment"][what], now["environment"][what]
        if a != b:
            return f"{what}: {_words(a)} and {_words(b)}"
    return ""


def _words(value: Any) -> str:
    return f"{value['name']} ({value['cores']} cores)" if isinstance(value, dict) else str(value)


def _times(entry: Entry) -> dict[str, float]:
    """Our time over each other run's."""
    return {name: run["ratio"]["median"] for name, run in entry["runs"].items() if run["ratio"]}


def _exact(entry: Entry) -> dict[str, float]:
    """Numbers that don't depend on the machine's mood: memory, and figures that bars are set on."""
    found = {name: entry["figures"][name] for name in entry["bars"] if name in entry["figures"]}
    peak = entry["runs"][OURS]["peak_bytes"]
    return found if peak is None else {**found, "peak_bytes": peak}


def _judged(
    old: float | None, now: float | None, tolerance: float, better: Kind, worse: Kind
) -> Kind:
    """Lower is better."""
    if old is None or now is None:
        return "new" if old is None else "missing"
    if now > old * (1 + tolerance):
        return worse
    # The mirror image: what is worse one way is better the other way round.
    return better if old > now * (1 + tolerance) else "same"
