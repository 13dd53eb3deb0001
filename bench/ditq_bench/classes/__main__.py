"""`python -m ditq_bench.classes --work FOLDER [OPTIONS] [NAME ...]`: the table of docs/families_classes.md."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ditq_bench.classes.again import check_again
from ditq_bench.classes.row import Row
from ditq_bench.classes.sweep import sweep
from ditq_bench.classes.table import failures, markdown, write_csv
from ditq_bench.results import commit
from ditq_bench.zoo import CLASSES

TOGETHER = 5  # classes that one new process loads


def main(
    work: Annotated[
        Path, typer.Option(help="Finished classes stay here, and are not swept again.")
    ],
    names: Annotated[list[str] | None, typer.Argument()] = None,
    csv: Path | None = None,
    out: Path | None = None,
) -> None:
    """Sweep the classes whose name holds one of NAMES (all if there are none)."""
    chosen = [name for name in CLASSES if not names or any(part in name for part in names)]
    todo = [name for name in chosen if not finished(work, name).exists()]
    for start in range(0, len(todo), TOGETHER):
        for row in sweep_together(todo[start : start + TOGETHER], work):
            row.write(finished(work, row.name))
            typer.echo(f"{row.name}: {'; '.join(failures(row)) or len(row.recipes)}", err=True)
    rows = [Row.read(finished(work, name)) for name in chosen]
    if csv is not None:
        write_csv(csv, rows)
    table = markdown(rows)
    if out is not None:
        out.write_text(table, encoding="utf-8")
    typer.echo(table)


def finished(work: Path, name: str) -> Path:
    """The row of a class that is done."""
    return work / f"{name}.json"


def sweep_together(names: Sequence[str], work: Path) -> list[Row]:
    """Sweep some classes, and load all their checkpoints in one new process."""
    place = work / "checkpoints"
    shutil.rmtree(place, ignore_errors=True)
    rows = [sweep(CLASSES[name], place / name) for name in names]
    again = check_again(place)
    for row in rows:
        row.commit = commit()
        for recipe, why in again.get(row.name, {}).items():
            row.recipes[recipe].failed = row.recipes[recipe].failed or why
    shutil.rmtree(place)
    return rows


if __name__ == "__main__":
    typer.run(main)
