"""What commands print: tables for people, JSON for programs, one line for a failure."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from ditq_runtime.cli.voice import voice

FIGURE = re.compile(r"[-+]?(\d[\d,]*)(\.\d+)?(e[-+]?\d+)?|-|", re.IGNORECASE)  # or none
GAP = "  "


def print_json(content: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
    sys.stdout.flush()


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], droppable: Sequence[str] = ()
) -> None:
    """A table on stdout; CSV with --csv.

    On a terminal that is too narrow for it columns are dropped, the first of `droppable` first; where that is not
    enough, one line a value, row by row.
    """
    if voice.csv:
        say(title)
        csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *rows])
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    say("\n".join([title, *table_lines(columns, rows, width, droppable)]))


def table_lines(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    width: int | None,
    droppable: Sequence[str] = (),
) -> list[str]:
    """The lines of a table; no word and no number is ever broken.

    Args:
        columns: headings.
        rows: values; columns of figures are right-aligned.
        width: characters of the terminal; None: as wide as it needs.
        droppable: columns that may be left out for the width, the first one first.
    """
    rows = [list(row) for row in rows]
    texts = [[shown(cell) for cell in row] for row in rows]
    widths = [
        max(map(len, (heading, *column))) for heading, *column in zip(columns, *texts, strict=True)
    ]
    total = sum(widths) + len(GAP) * (len(widths) - 1)
    if width is not None and total > width and len(columns) > 1:
        if not droppable:
            return _stacked(columns, texts, width)
        kept = [i for i, name in enumerate(columns) if name != droppable[0]]
        fewer = [[row[i] for i in kept] for row in rows]
        return table_lines([columns[i] for i in kept], fewer, width, droppable[1:])
    right = [bool(rows) and are_figures([row[i] for row in texts]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        placed = (
            cell.rjust(size) if aligned else cell.ljust(size)
            for cell, size, aligned in zip(cells, widths, right, strict=True)
        )
        return GAP.join(placed).rstrip()

    return [line(columns), line(["-" * size for size in widths]), *map(line, texts)]


def _stacked(columns: Sequence[str], texts: list[list[str]], width: int) -> list[str]:
    """A value under the other, each with its heading, and an empty line between rows; none for an empty value."""
    size = max(map(len, columns))
    lines = []
    for row in texts:
        for name, cell in zip(columns, row, strict=True):
            parts = textwrap.wrap(
                cell,
                max(width - size - len(GAP), 1),
                break_long_words=False,
                break_on_hyphens=False,
            )
            heads = [name, *[""] * (len(parts) - 1)]
            lines += [
                f"{head.ljust(size)}{GAP}{part}" for head, part in zip(heads, parts, strict=False)
            ]
        lines.append("")
    return lines[:-1]


def say(text: str) -> None:
    """Plain text on stdout; on stderr where stdout carries CSV."""
    stream = sys.stderr if voice.csv else sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def complain(text: str) -> None:
    """One line on stderr: why a command ends."""
    sys.stderr.write(f"ditq: {text}\n")


def mebibytes(nbytes: float) -> str:
    """Bytes as MiB with two decimals."""
    return f"{nbytes / 2**20:.2f} MiB"


def are_figures(cells: Sequence[str]) -> bool:
    """A column of numbers, some of which may be missing."""
    return all(FIGURE.fullmatch(cell) for cell in cells) and any(c.strip("-") for c in cells)


def shown(cell: Any) -> str:
    """A cell as people read it: floats with three digits, thousands with commas, text on one line."""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if 1000 <= abs(cell) < 1e9 else f"{cell:.3g}"
    text = f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)
    return " ".join(text.split())
