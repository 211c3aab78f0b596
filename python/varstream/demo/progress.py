"""What the user sees while a run goes on: headings, notes and a progress bar per stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[str], None]


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
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=30)]
        if total is not None:
            columns += [MofNCompleteColumn()]
        columns += [TimeElapsedColumn()]
        if total is not None:
            columns += [TextColumn("left"), TimeRemainingColumn()]
        columns += [TextColumn("{task.fields[news]}")]
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(what, total=total, news="")

            def advance(news: str) -> None:
                bar.update(task, advance=1, news=news)

            yield advance
