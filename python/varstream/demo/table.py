"""The comparison as one table: for the terminal, as Markdown and as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from varstream.demo.measure import FLOAT64, FirstRun, Speed
from varstream.demo.methods import METHODS
from varstream.demo.search import Search
from varstream.demo.settings import MIB


@dataclass(frozen=True)
class Comparison:
    """All that was measured, by the methods' keys."""

    speed: dict[str, Speed]
    first: dict[str, FirstRun]
    lengths: dict[str, Search]
    budget: int  # MiB
    documents: list[int]  # lengths of the compared documents

    def columns(self) -> list[str]:
        return [
            "method",
            "tokens/s",
            "peak memory of the backward (MiB)",
            f"largest document under {self.budget} MiB (tokens)",
            "worst gradient difference",
        ]

    def rows(self) -> list[list[str]]:
        return [
            [
                method.name,
                f"{self.speed[method.key].tokens_per_second:,.0f}",
                f"{self.first[method.key].peak_bytes / MIB:,.0f}",
                self.lengths[method.key].result(),
                f"{self.first[method.key].gradient_difference:.1e}",
            ]
            for method in METHODS
        ]

    def notes(self) -> list[str]:
        tokens, longest = sum(self.documents), max(self.documents)
        rounds = len(self.speed[METHODS[0].key].seconds)
        fill = tokens / (longest * len(self.documents))
        return [
            f"tokens/s, peak memory, gradients: the same {len(self.documents)} documents at evenly "
            f"spaced quantiles of length, {tokens:,} real tokens, longest {longest:,}, "
            f"{fill:.0%} full when padded; padding doesn't count as tokens",
            f"tokens/s: median of {rounds} interleaved runs of forward and backward",
            "peak memory: what one forward and backward allocate at most, gradients included, "
            "weights not",
            "gradient difference: worst parameter, relative to dense float64 run document by "
            f"document; varstream in float64: {self.first[FLOAT64.key].gradient_difference:.1e}",
            *(f"{method.name}: {method.note}" for method in METHODS),
        ]

    def rich(self) -> Table:
        table = Table(title="Same documents, same weights", title_justify="left")
        for i, column in enumerate(self.columns()):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for row in self.rows():
            table.add_row(*row, style="bold" if row[0] == "varstream" else "")
        return table

    def markdown(self) -> str:
        columns = self.columns()
        lines = ["---"] + ["---:"] * (len(columns) - 1)
        table = [columns, lines, *self.rows()]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
        return f"{body}\n\n" + "\n".join(f"- {note}" for note in self.notes()) + "\n"

    def as_json(self) -> dict[str, Any]:
        methods = {
            method.key: {
                "name": method.name,
                "note": method.note,
                "tokens_per_second": self.speed[method.key].tokens_per_second,
                "seconds": self.speed[method.key].seconds,
                "peak_bytes": self.first[method.key].peak_bytes,
                "largest_document": self.lengths[method.key].largest,
                "largest_document_is_cap": self.lengths[method.key].capped,
                "worst_gradient_difference": self.first[method.key].gradient_difference,
            }
            for method in METHODS
        }
        return {
            "columns": self.columns(),
            "methods": methods,
            "varstream_float64_gradient_difference": self.first[FLOAT64.key].gradient_difference,
            "budget_mib": self.budget,
            "document_lengths": self.documents,
            "notes": self.notes(),
        }
