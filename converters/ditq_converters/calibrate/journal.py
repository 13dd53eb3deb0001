"""Progress of a calibration: a bar on the screen, and lines with times and ETA in a file of its folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ditq_converters.progress import progress_bar

LOG = "calibrate.log"
EVERY = 30.0  # seconds between two lines about one input


@dataclass
class Journal:
    """What a run tells about itself."""

    path: Path
    total: int
    done: int
    advance: Callable[[], None]
    begin: float
    made: int = 0
    last: float = field(default_factory=time.monotonic)

    def write(self, text: str) -> None:
        """One line, with the date and the process."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{stamp} process {os.getpid()}: {text}\n")
        self.last = time.monotonic()

    def visit(self, index: int, calls: int, timestep: float) -> None:
        """Somewhere inside an input; written now and then."""
        if time.monotonic() - self.last > EVERY:
            self.write(f"input {index}: {calls} calls, now at timestep {timestep:g}")

    def finished(self, index: int, calls: int) -> None:
        """One input more is on disk."""
        self.made, self.done = self.made + 1, self.done + 1
        each = (time.monotonic() - self.begin) / self.made
        self.advance()
        self.write(
            f"input {index} done, {calls} calls; {self.done} of {self.total}, {each:.1f} s each, "
            f"ETA {each * (self.total - self.done):.0f} s"
        )


@contextmanager
def journal(folder: Path, total: int, done: int, quiet: bool) -> Iterator[Journal]:
    """A bar of inputs, and the log file."""
    with progress_bar("calibrating", total, done, quiet) as advance:
        yield Journal(folder / LOG, total, done, advance, time.monotonic())
