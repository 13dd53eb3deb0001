"""One progress bar for all long work: what is done, how fast, and when it ends; and a line beside it."""

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


@contextmanager
def progress_bar(
    title: str, total: int, done: int = 0, quiet: bool = False
) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr; the block gets a function that advances it by one.

    Args:
        title: what is being done.
        total: number of steps.
        done: steps already done by an earlier run.
        quiet: show nothing.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda: bar.advance(task)


def note(text: str, quiet: bool = False) -> None:
    """One plain line on stderr, beside the bar."""
    if not quiet:
        console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
        console.print(text)
