"""How much a command says, and in which form: set once, by the command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Voice:
    """What `ditq` was told before or among the options of a command.

    Attributes:
        quiet: no progress and no notes; results and errors only.
        verbose: also what other libraries say, and what a command took.
        csv: tables as CSV; sentences then go to stderr.
        line: the command line, quoted so that it can be pasted; "" where a program called.
    """

    quiet: bool = False
    verbose: bool = False
    csv: bool = False
    line: str = ""


voice = Voice()
