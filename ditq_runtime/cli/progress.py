"""Long work shows what is done, how fast, and when it ends: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ditq_runtime.cli.voice import voice

EVERY = 15.0  # seconds between lines where stderr is no terminal


@contextmanager
def progress_bar(
    title: str, total: int, done: int = 0, quiet: bool = False
) -> Iterator[Callable[[], None]]:
    """Show progress on stderr; the block gets a function that advances it by one.

    Args:
        title: what is being done.
        total: number of steps.
        done: steps already done by an earlier run.
        quiet: show nothing.
    """
    if quiet or voice.quiet:
        yield lambda: None
    elif sys.stderr.isatty():
        with _bar(title, total, done) as advance:
            yield advance
    else:
        yield Lines(title, total, done).advance


@contextmanager
def told_steps(pipe: Any, total: int) -> Iterator[None]:
    """Show the steps of a pipeline's scheduler inside the block; `total` are expected, 0 where nobody can tell."""
    if not total or not hasattr(getattr(pipe, "scheduler", None), "step"):
        yield
        return
    scheduler, step = pipe.scheduler, pipe.scheduler.step
    with progress_bar("sampling", total) as advance:

        def stepped(*args: Any, **given: Any) -> Any:
            made = step(*args, **given)
            advance()
            return made

        scheduler.step = stepped
        try:
            yield
        finally:
            del scheduler.step


class Lines:
    """A line on stderr every EVERY seconds, and one at the end."""

    def __init__(
        self, title: str, total: int, done: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Count from `done`; a clock gives seconds."""
        self.title, self.total, self.done, self.clock = title, total, done, clock
        self.first, self.begin = done, clock()
        self.told = self.begin

    def advance(self) -> None:
        """One step more is done."""
        self.done += 1
        now = self.clock()
        if self.done < self.total and now - self.told < EVERY:
            return
        self.told = now
        took = now - self.begin
        left = took / (self.done - self.first) * max(self.total - self.done, 0)
        note(
            f"{self.title}: {self.done} of {self.total}, {_clock(took)} so far, {_clock(left)} to go"
        )


@contextmanager
def _bar(title: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda: bar.advance(task)


def note(text: str, quiet: bool = False) -> None:
    """One plain line on stderr, beside the bar."""
    if not (quiet or voice.quiet):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
