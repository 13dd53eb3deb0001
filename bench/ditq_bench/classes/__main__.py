"""`python -m ditq_bench.classes [--csv FILE] [--out FILE] [NAME ...]`: the table of docs/families.md."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ditq_bench.classes.again import check_again
from ditq_bench.classes.sweep import RECIPES, sweep
from ditq_bench.classes.table import markdown, write_csv
from ditq_bench.results import commit
from ditq_bench.zoo import CLASSES


def main(
    names: Annotated[list[str] | None, typer.Argument()] = None,
    csv: Path | None = None,
    out: Path | None = None,
) -> None:
    """Sweep the classes whose name holds one of NAMES (all if there are none)."""
    chosen = {n: c for n, c in CLASSES.items() if not names or any(part in n for part in names)}
    with tempfile.TemporaryDirectory() as place:
        rows = []
        for name, tiny in chosen.items():
            rows.append(sweep(tiny, Path(place) / name))
            typer.echo(f"{name}: {rows[-1].failed or len(rows[-1].recipes)}", err=True)
        again = check_again(Path(place))
    for row in rows:
        for recipe, why in again.get(row.name, {}).items():
            row.recipes[recipe].failed = row.recipes[recipe].failed or why
    if csv is not None:
        write_csv(csv, rows, commit())
    table = markdown(rows, list(RECIPES))
    if out is not None:
        out.write_text(table, encoding="utf-8")
    typer.echo(table)


if __name__ == "__main__":
    typer.run(main)
