"""Rows of the sweep as CSV and as a table for docs/families.md."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ditq_bench.classes.sweep import Converted, Row

KINDS = ("norm", "value", "product", "quantizer")


def write_csv(path: Path, rows: Sequence[Row], commit: str) -> None:
    """One line per class and recipe, or one for a class that fails before any."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["class", "blocks", "sites", "shared", *KINDS, "proof", "timestep", "recipe", "integers", "four_bits",
             "error", "failed", "commit"]
        )  # fmt: skip
        for row in rows:
            kinds = [row.kinds.get(kind, 0) for kind in KINDS]
            found = [row.name, row.blocks, row.sites, row.shared, *kinds, f"{row.proof:.1e}"]
            for name, done in (row.recipes or {"": Converted(failed=row.failed)}).items():
                shares = [f"{done.integers:.4f}", f"{done.four_bits:.4f}", f"{done.error:.5f}"]
                writer.writerow([*found, row.timestep, name, *shares, done.failed, commit])


def markdown(rows: Sequence[Row], recipes: Sequence[str]) -> str:
    """A table, one line per class: what was found, then integers and error of each recipe; then what failed."""
    head = ["class", "sites", "norm, V, product", "proof", "timestep", *recipes]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if row.failed:
            continue
        folds = ", ".join(str(row.kinds.get(kind, 0)) for kind in KINDS[:3])
        proof = f"{row.proof:.0e}" if row.proof else ""
        timestep = f"`{row.timestep}`" if row.timestep.isidentifier() else "none or several"
        cells = [_cell(row.recipes[name]) for name in recipes]
        shown = [f"`{row.name}`", str(row.sites), folds, proof, timestep, *cells]
        lines.append("| " + " | ".join(shown) + " |")
    failed = [f"* `{row.name}`: {why}" for row in rows for why in _failures(row)]
    return "\n".join([*lines, "", *failed]) + "\n"


def _cell(done: Converted) -> str:
    return "failed" if done.failed else f"{100 * done.integers:.1f} %, {done.error:.4f}"


def _failures(row: Row) -> list[str]:
    if row.failed:
        return [row.failed]
    return [f"{name}: {done.failed}" for name, done in row.recipes.items() if done.failed]
