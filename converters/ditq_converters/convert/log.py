"""What a long conversion tells, beside its progress bar: lines with times and ETA in a file."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from ditq_converters.convert.reconstruct import Tell

LOG = "convert.log"
EVERY = 30.0  # seconds between two lines about one part


@dataclass
class Log:
    """Of one conversion, with its unfinished blocks.

    Attributes:
        path: of the file; lines are appended.
        total: parts of the model.
        done: parts that are there.
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

    def learning(self, name: str) -> Tell:
        """What is called after every iteration of a block; it writes now and then."""
        begin = time.monotonic()

        def tell(step: int, total: int, error: float) -> None:
            if time.monotonic() - self.last > EVERY or step == total:
                left = (time.monotonic() - begin) / step * (total - step)
                self.write(
                    f"{name}: iteration {step} of {total}, error {error:.3f} of that before learning, "
                    f"ETA of the block {left:.0f} s"
                )

        return tell

    def finished(self, name: str) -> None:
        """One part more is on disk."""
        self.made, self.done = self.made + 1, self.done + 1
        each = (time.monotonic() - self.begin) / self.made
        self.write(
            f"{name} done; {self.done} of {self.total}, {each:.1f} s each, "
            f"ETA {each * (self.total - self.done):.0f} s"
        )
