"""Long work shows what is done: the commands' own progress bar, and beside it lines with times and an ETA in a file."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from ditq_runtime.cli.progress import note, progress_bar

__all__ = ["Log", "note", "progress_bar"]

EVERY = 30.0  # seconds between two lines about one piece


@dataclass
class Log:
    """Lines about work in pieces: inputs of a calibration, parts of a conversion.

    Attributes:
        path: of the file; lines are appended.
        total: pieces.
        done: pieces that are there.
    """

    path: Path
    total: int
    done: int
    begin: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    made: int = 0

    def write(self, text: str) -> None:
        """One line, with the date and the process."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{stamp} process {os.getpid()}: {text}\n")
        self.last = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last line is old."""
        return time.monotonic() - self.last > EVERY

    def finished(self, text: str) -> None:
        """One piece more is on disk."""
        self.made, self.done = self.made + 1, self.done + 1
        each = (time.monotonic() - self.begin) / self.made
        self.write(
            f"{text}; {self.done} of {self.total}, {each:.1f} s each, ETA {each * (self.total - self.done):.0f} s"
        )
