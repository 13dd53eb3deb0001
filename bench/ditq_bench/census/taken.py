"""What a census takes: cases that are compiled, those that a table knows, and what the gate holds against both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from ditq_bench.census import gate, known
from ditq_bench.census.rows import Case, CensusRow, KnownRow, census_rows
from ditq_bench.results import commit
from ditq_converters.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class Taken:
    """A census.

    Attributes:
        compiled: counted now, by digest; digests are empty without a table.
        kept: known, and not compiled.
        refused: a sentence for each case that does not compile.
    """

    compiled: list[tuple[str, CensusRow]]
    kept: list[KnownRow]
    refused: list[str]

    @property
    def rows(self) -> list[CensusRow | KnownRow]:
        """All of them."""
        return [*(row for _, row in self.compiled), *self.kept]


def take(found: Sequence[Case], table: Path | None) -> Taken:
    """Compile cases, less those that a table of counts knows."""
    digests, kept = dict.fromkeys(range(len(found)), ""), list[KnownRow]()
    if table is not None:
        counts = known.load(table, triton_version())
        digests, kept = known.split(found, counts, commit())
    with progress_bar("census", len(digests)) as advance:
        made = census_rows([found[i] for i in digests], advance)
    pairs = zip(digests.values(), made, strict=True)
    compiled = [(digest, row) for digest, row in pairs if isinstance(row, CensusRow)]
    return Taken(compiled, kept, [row for row in made if isinstance(row, str)])


def faults(taken: Taken, table: Path | None) -> list[str]:
    """What the gate holds against a census, a sentence each."""
    budget = gate.load_budget()["instructions"]
    wrong = [fault for _, row in taken.compiled for fault in gate.faults(row, budget)]
    wrong += [fault for row in taken.kept for fault in gate.known_faults(row, budget)]
    if table is not None:
        counts = known.load(table, triton_version())
        wrong += [fault for pair in taken.compiled for fault in known.differences(*pair, counts)]
    return wrong + taken.refused


def write_known(taken: Taken, table: Path) -> None:
    """Write what was compiled into a table: rows without faults are known from now on."""
    budget = gate.load_budget()["instructions"]
    sound = [pair for pair in taken.compiled if not gate.faults(pair[1], budget)]
    known.write(table, triton_version(), commit(), taken.kept, sound)


def triton_version() -> str:
    """Of the release that compiles."""
    return version("triton")
