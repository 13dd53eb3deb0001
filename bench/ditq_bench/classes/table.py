"""Rows of the sweep as CSV and as a table for docs/families_classes.md."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ditq_bench.classes.recipes import RECIPES, REFUSED
from ditq_bench.classes.row import Converted, Row
from ditq_runtime.files import atomic_file

KINDS = ("norm", "value", "product", "quantizer")
FIELDS = (
    "class", "calibrated", "blocks", "sites", "shared", *KINDS, "proof", "timestep", "recipe", "integers", "four_bits",
    "error", "planted_sites", "planted_linear", "planted_smoothquant", "recovered_db", "bf16", "float_bf16",
    "bf16_excess", "failed", "commit",
)  # fmt: skip
ENOUGH, FOURS, GAIN, MOST = 0.95, 0.9, 10.0, 1.0  # shares; dB; bf16_excess


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per class and recipe, or one for a class that fails before any."""
    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for row in rows:
            kinds = [row.kinds.get(kind, 0) for kind in KINDS]
            found = [row.name, row.calibrated, row.blocks, row.sites, row.shared, *kinds]
            planted = row.planted
            errors = planted.linear, planted.smoothquant, planted.bf16, planted.float_bf16
            linear, smooth, bf16, float_bf16 = (f"{error:.5f}" for error in errors)
            salient = [planted.sites, linear, smooth, f"{planted.recovered:.1f}", bf16, float_bf16]
            for name, done in (row.recipes or {"": Converted(failed=row.failed)}).items():
                shares = [f"{done.integers:.4f}", f"{done.four_bits:.4f}", f"{done.error:.5f}"]
                failed = done.failed or planted.failed
                writer.writerow(
                    [*found, f"{row.proof:.1e}", row.timestep, name, *shares, *salient,
                     f"{planted.bf16_excess:.3f}", failed, row.commit]
                )  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """What all came to, in a sentence each; a table, one line per class; then what failed, and why."""
    good = [row for row in rows if not row.failed]
    recipes = [name for name in RECIPES if any(name in row.recipes for row in good)]
    found = ["class", "sites", "norm, V, product", "proof", "integers", "4 bits"]
    head = [*found, *recipes, "planted", "bf16"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in good:
        folds = ", ".join(str(row.kinds.get(kind, 0)) for kind in KINDS[:3])
        proof = f"{row.proof:.0e}" if row.proof else ""
        name = f"`{row.name}`" + "*" * row.calibrated.isidentifier()
        shares = [_percent(least(row, ENOUGH_OF[bits])) for bits in (8, 4)]
        cells = [_cell(row.recipes[recipe]) for recipe in recipes]
        planted = row.planted
        salient = [f"{planted.recovered:.0f} dB", f"{planted.bf16_excess:.2f}"]
        if not planted.sites or planted.failed:
            salient = ["", ""]
        shown = [name, str(row.sites), folds, proof, *shares, *cells, *salient]
        lines.append("| " + " | ".join(shown) + " |")
    failed = [f"* `{row.name}`: {why}" for row in rows for why in failures(row)]
    return "\n".join([*summary(rows), "", *lines, "", *failed]) + "\n"


def summary(rows: Sequence[Row]) -> list[str]:
    """Counts over the classes."""
    done = [row for row in rows if not row.failed]
    whole = [row for row in done if all(_fine(one) for one in row.recipes.values())]
    salient = [row for row in done if row.planted.sites and not row.planted.failed]
    piped = sum(row.calibrated.isidentifier() for row in done)
    integers = sum(least(row, ENOUGH_OF[8]) >= ENOUGH for row in whole)
    fours = sum(least(row, ENOUGH_OF[4]) >= FOURS for row in whole)
    gained = sum(row.planted.recovered >= GAIN for row in salient)
    kept = sum(row.planted.bf16_excess <= MOST for row in salient)
    return [
        f"* {len(done)} of {len(rows)} classes are swept, {piped} of them calibrated through a tiny pipeline",
        f"  (marked *); {len(whole)} carry out every recipe.",
        f"* {integers} have at least 95 % of their block linears' parameters in integers, {fours} at least 90 %",
        "  of them in 4 bits where 4 were asked for.",
        f"* Planted salience: {len(salient)} have folds to plant it through; smoothing recovers at least 10 dB",
        f"  on {gained} of them.",
        f"* bf16: on {kept} of these the smoothed model's error is no larger than that in fp32 and the float",
        "  model's own in bf16 together.",
    ]


ENOUGH_OF = {8: ("integers", ""), 4: ("four_bits", "w4")}  # share, and a part of its recipes' names


def least(row: Row, of: tuple[str, str]) -> float:
    """The least share over a class's recipes that did not fail."""
    share, part = of
    found = [getattr(d, share) for name, d in row.recipes.items() if part in name and not d.failed]
    return min(found, default=0.0)


def failures(row: Row) -> list[str]:
    """What failed and why, the same reason once."""
    if row.failed:
        return [row.failed]
    found: dict[str, list[str]] = {}
    for name, done in row.recipes.items():
        if done.failed:
            found.setdefault(done.failed, []).append(name)
    if row.planted.failed:
        found.setdefault(row.planted.failed, []).append("planted")
    return [f"{', '.join(names)}: {why}" for why, names in found.items()]


def _fine(done: Converted) -> bool:
    return not done.failed


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cell(done: Converted) -> str:
    if REFUSED in done.failed:
        return "refused"
    return "failed" if done.failed else f"{done.error:.4f}"
