"""What a case may end with: the right result, or an error of ours that is one sentence. Anything else is a finding."""

from __future__ import annotations

import resource
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ditq_kernels
import ditq_runtime
from ditq_converters.calibrate.errors import StatisticsError

OURS = (ditq_runtime.CheckpointError, StatisticsError, ValueError, FileExistsError)  # exactly these
HOMES = tuple(
    str(Path(module.__file__ or "").parent.parent / name)
    for module in (ditq_kernels, ditq_runtime)
    for name in ("ditq_runtime", "ditq_kernels", "ditq_converters", "converters")
)
DIFFUSERS = "is not a valid JSON file"  # of a config.json; it cannot be known for one of ours then
PATIENCE = 20  # seconds until a case hangs
ROOM = 1 << 30  # bytes that a case may map beyond what the process has, far above any file here


class Hang(BaseException):
    """A case took longer than `PATIENCE`."""


@dataclass
class Tally:
    """Outcomes of one kind of attack.

    Attributes:
        kind: of the attack.
        seed: of its cases.
        cases: that ran.
        right: that gave the right result.
        named: that ended with a sentence of ours.
        findings: the others, each with its number and what came.
    """

    kind: str
    seed: int
    cases: int = 0
    right: int = 0
    named: int = 0
    findings: list[str] = field(default_factory=list)

    def add(self, number: int, what: str, error: BaseException | None, right: bool = True) -> None:
        """Count one case.

        Args:
            number: of the case, which its seed and this number make again.
            what: was done to the input.
            error: that it ended with, or None.
            right: without an error: the result is that of the undamaged input.
        """
        self.cases += 1
        if error is None and right:
            self.right += 1
        elif error is not None and is_named(error):
            self.named += 1
        else:
            came = "another result" if error is None else f"{type(error).__name__}: {error}"
            self.findings.append(f"{self.kind} {number}: {what}: {came}"[:500])


def is_named(error: BaseException) -> bool:
    """Whether our own code raised it as a sentence, or diffusers said that a config is no JSON."""
    text = str(error)
    if isinstance(error, OSError) and DIFFUSERS in text:
        return True
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return type(error) in OURS and last.startswith(HOMES) and bool(text) and "\n" not in text


@contextmanager
def bounded() -> Iterator[None]:
    """Let nothing in here hang, or map much more memory than the process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    before = signal.signal(signal.SIGALRM, _hang)
    resource.setrlimit(resource.RLIMIT_AS, (used * resource.getpagesize() + ROOM, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def timed() -> Iterator[None]:
    """One case inside of `bounded`."""
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)


def _hang(*_: Any) -> None:
    raise Hang(f"it took longer than {PATIENCE} s")
