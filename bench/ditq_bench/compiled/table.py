"""The table of docs/performance.md, from bench/results/launches.csv."""

from __future__ import annotations

import csv
from pathlib import Path

WAYS = ("float", "inductor", "ditq", "ditq wide")


def table(path: Path) -> list[str]:
    """One line a block: launches each way, in the order of the file; empty where nothing was counted."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {(row["block"], row["way"]): row["launches"] for row in rows}
    lines = [
        '| block | float | packed, Inductor | packed, `backend="ditq"` | the same, wide rows |',
        "|---|---|---|---|---|",
    ]
    for block in dict.fromkeys(row["block"] for row in rows):
        lines.append(f"| {' | '.join([block, *(found.get((block, way), '') for way in WAYS)])} |")
    return lines
