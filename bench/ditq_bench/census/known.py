"""Counts that are known, in a table: what decides the machine code of a launch is the same, so it need not be compiled.

That a digest decides is checked all the time: a part of what is known is compiled nevertheless, another one at each
commit, and must have the counts of the table.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditq_bench.census import gate, issue_model
from ditq_bench.census.rows import FIELDS, Case, CensusRow, KnownRow
from ditq_runtime.files import atomic_file

LABELS = ("triton", "commit", "digest")
COLUMNS = (*LABELS, *(name for name in FIELDS if name != "mix"))
COUNTS = ("registers", "stack", "spills", "shared", "mma", "instructions", "products")
ONE_OF = 16  # known launches that is compiled at a commit

Known = dict[str, KnownRow]  # by digest


def load(path: Path, triton: str) -> Known:
    """Rows of a Triton release; none if there is no file."""
    return {row["digest"]: KnownRow(row) for row in _read(path) if row["triton"] == triton}


def digest_of(case: Case) -> str:
    """Of what decides the machine code of a case, and of what counts and judges it."""
    from ditq_kernels._triton.offline import compile as offline

    text = f"{case} {offline.digest(*case)} {_judges()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def split(
    found: Sequence[Case], known: Known, commit: str
) -> tuple[dict[int, str], list[KnownRow]]:
    """Places and digests of what to compile, which is not known or in the sample; what is known of all others."""
    compiled: dict[int, str] = {}
    kept = []
    for i, digest in enumerate(map(digest_of, found)):
        if digest in known and not sampled(digest, commit):
            kept.append(known[digest])
        else:
            compiled[i] = digest
    return compiled, kept


def sampled(digest: str, commit: str) -> bool:
    """Whether a known launch is compiled at a commit: one of ONE_OF, always the same at the same commit."""
    drawn = hashlib.sha256(f"{commit} {digest}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") % ONE_OF == 0


def differences(digest: str, row: CensusRow, known: Known) -> list[str]:
    """A sentence if a known launch was compiled and has other counts."""
    if digest not in known:
        return []
    fields, before = row.fields(), known[digest].text
    other = [
        f"{name} {_text(fields[name])}, known {before[name]}"
        for name in COUNTS
        if _text(fields[name]) != before[name]
    ]
    return [f"{row.name}: {', '.join(other)}, from the same sources"] if other else []


def write(
    path: Path,
    triton: str,
    commit: str,
    kept: Sequence[KnownRow],
    taken: Sequence[tuple[str, CensusRow]],
) -> None:
    """Rows that were kept and, by digest, that were taken, in the place of a Triton release's of those kernels."""
    before = load(path, triton)
    labels = {"triton": triton, "commit": commit}
    fresh: list[dict[str, str]] = [
        before[digest].text
        if digest in before
        else labels | {"digest": digest} | {n: _text(v) for n, v in row.fields().items()}
        for digest, row in taken
    ] + [row.text for row in kept]
    replaced = {_whose(row) for row in fresh}
    made = [row for row in _read(path) if _whose(row) not in replaced] + fresh
    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(sorted(made, key=_place))


def _whose(row: dict[str, str]) -> tuple[str, str, int]:
    return row["triton"], row["kernel"], int(row["target"])


def _place(row: Any) -> tuple[Any, ...]:
    return *_whose(row), row["launch"], row["digest"]


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _text(value: Any) -> str:
    return "" if value is None else str(value)


@functools.cache
def _judges() -> str:
    """Sources of what counts instructions and of what the gate holds against counts."""
    from ditq_kernels._triton.offline import machine_code
    from ditq_kernels._triton.offline.digest import text_of

    return "\n".join(map(text_of, (machine_code, issue_model, gate)))
