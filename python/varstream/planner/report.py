"""A plan as people and programs read it: parts, words, reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NOT_MEASURED = "predicted, not yet measured on a GPU"


@dataclass(frozen=True)
class MemoryPlan:
    """A training step's predicted memory and the chunks it was predicted for.

    Attributes:
        parts: bytes of each part at the moment of the peak; they add up to ``peak_bytes``.
        peak_bytes: of the whole job: weights, gradients, optimizer states and the step.
        step_bytes: what forward and backward allocate at most on top of what existed before
            (gradients they leave included): what ``varstream.testing.peak_memory`` measures.
        moment: when the peak is reached.
        moments: every moment looked at and the whole job's bytes then.
        chunk_size: rows of a layer chunk.
        head_chunk_size: rows of a chunk of logits.
        tokens, longest: real tokens of the step and of its longest document.
        positions: the config's ``max_position_embeddings``. Memory knows no such bound, so a plan
            may pass it; what is printed says so.
        dtype: of weights and activations.
        optimizer: ``"adamw"``, ``"sgd"`` or ``"none"``.
        budget_bytes: the whole job's bound, or None.
        max_tokens: the most tokens that fit the budget with any chunks the caller left open; None
            without a budget.
        fits: whether ``peak_bytes`` is within the budget; True without one.
        reason: why these chunks, or why it can't fit and what to change.
        mode: what is trained: ``"full"``, ``"lora"``, ``"frozen"``, or ``"model"``, what the given
            model says.
        device: what it was predicted for: ``"cpu"``, or a GPU's name.
        knee: rows a chunk should have on that device, see ``varstream.planner.knee``.
        below_knee: what to warn of where the chunk has fewer; "" otherwise.
        measured: whether predictions for that device are compared with measured peaks.
    """

    parts: dict[str, int]
    peak_bytes: int
    step_bytes: int
    moment: str
    moments: dict[str, int]
    chunk_size: int
    head_chunk_size: int
    tokens: int
    longest: int
    positions: int
    dtype: str
    optimizer: str
    budget_bytes: int | None
    max_tokens: int | None
    fits: bool
    reason: str
    mode: str = "full"
    device: str = "cpu"
    knee: int = 1
    below_knee: str = ""
    measured: bool = True

    def as_json(self) -> dict[str, Any]:
        """Plain data; ``MemoryPlan(**data)`` is this plan again."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [(name, size, size / self.peak_bytes) for name, size in self.parts.items()]
        width = max(len(name) for name in self.parts)
        lines = [f"{self.title}: {size_words(self.peak_bytes)} at the {self.moment}"]
        lines += [
            f"  {name:<{width}}  {size_words(size):>10}  {share:4.0%}" for name, size, share in rows
        ]
        return "\n".join([*lines, *(f"{name}: {value}" for name, value in self.summary())])

    @property
    def title(self) -> str:
        """Tokens and dtype in words."""
        documents = "one document" if self.longest == self.tokens else f"longest {self.longest:,}"
        what = [self.dtype, self.optimizer] + ([self.mode] if self.mode != "full" else [])
        where = "" if self.device == "cpu" else f", {self.device}"
        return f"{self.tokens:,} tokens ({documents}), {', '.join(what)}{where}"

    def summary(self) -> list[tuple[str, str]]:
        """What is shown below the parts."""
        lines = [] if self.measured else [("status", NOT_MEASURED)]
        lines += [
            ("step alone", size_words(self.step_bytes)),
            ("chunk size", f"{self.chunk_size:,} rows{self._at_knee()}"),
            ("head chunk size", f"{self.head_chunk_size:,} rows"),
        ]
        if self.budget_bytes is not None:
            words = "fits" if self.fits else "does not fit"
            lines.append(("budget", f"{size_words(self.budget_bytes)}, {words}"))
            lines.append(("largest length", f"{self.max_tokens:,} tokens{self._by_memory()}"))
        if self.longest > self.positions:
            passed = f"the longest document passes the model's {self.positions:,}"
            lines.append(("positions", passed))
        return [*lines, ("reason", self.reason)]

    def _at_knee(self) -> str:
        return f", below the knee of {self.knee:,}" if self.below_knee else ""

    def _by_memory(self) -> str:
        """What to add to ``max_tokens`` where it, as one document, passes the positions."""
        one = self.longest == self.tokens
        if not one or self.max_tokens is None or self.max_tokens <= self.positions:
            return ""
        return f" by memory; the model has {self.positions:,} positions"

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", show_footer=True)
        table.add_column(f"at the {self.moment}", footer="peak")
        table.add_column("memory", justify="right", footer=size_words(self.peak_bytes))
        table.add_column("share", justify="right", footer="100%")
        for name, size in self.parts.items():
            table.add_row(name, size_words(size), f"{size / self.peak_bytes:.0%}")
        return table


def size_words(size: int) -> str:
    """Bytes for people: binary units, three digits."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
