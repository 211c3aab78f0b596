"""What the user sees while a run goes on: headings, notes and a progress bar per stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

Advance = Callable[[str], None]
WIDE = 100  # columns of a terminal that has room for a bar


class Report:
    """Prints to a console; of a bar, redirected output shows only the end."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    def heading(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]")

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Advance]:
        """A bar of ``total`` steps (None: unknown). The yielded function ends a step, with news."""
        columns: list[ProgressColumn] = [TextColumn("{task.description}")]
        if self.console.width >= WIDE:
            columns += [BarColumn(bar_width=20)]
        if total is not None:
            columns += [MofNCompleteColumn()]
        columns += [TimeElapsedColumn()]
        if total is not None:
            columns += [TextColumn("left"), TimeRemainingColumn()]
        # Only the news is cut where there is little room: it gets what the others leave.
        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        columns += [TextColumn("{task.fields[news]}", table_column=rest)]
        with Progress(*columns, console=self.console, expand=True) as bar:
            task = bar.add_task(what, total=total, news="")

            def advance(news: str) -> None:
                bar.update(task, advance=1, news=news)

            yield advance
