"""Pages of `ditq bench kernels` and `ditq bench model`, in the look of all reports."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ditq_bench.results import ORIGIN
from ditq_converters.pages.template import (
    Heading,
    neighbours,
    note,
    picture,
    side_by_side,
    table,
    write_page,
)
from ditq_runtime.cli.output import shown


def write_kernels_page(
    out: Path,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    doubts: Sequence[str],
    facts: dict[str, str],
) -> None:
    """Write kernels.html beside kernels.csv and its two pictures."""
    pictures = [
        picture(
            "speedup.png", "Speed over torch bf16 of the same run; a quantizer alone has no bar"
        ),
        picture("roofline.png", "Medians under the ceilings measured in the same run"),
    ]
    parts = [*map(note, doubts), side_by_side(pictures), _table(columns, rows)]
    _write(out, "kernels", "linears and attentions", parts, facts)


def write_model_page(
    out: Path,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    doubts: Sequence[str],
    facts: dict[str, str],
) -> None:
    """Write model.html beside model.csv."""
    _write(out, "model", title, [*map(note, doubts), _table(columns, rows)], facts)


def facts_of(origin: Sequence[str]) -> dict[str, str]:
    """What stands in every row, for the head of a page."""
    named = dict(zip(ORIGIN, origin, strict=True))
    versions = ", ".join(f"{name} {named[name]}" for name in ORIGIN[1:])
    return {"device": named["device"], "made with": versions}


def _write(out: Path, kind: str, model: str, parts: list[str], facts: dict[str, str]) -> None:
    name = f"{kind}.html"
    heading = Heading(f"ditq bench {kind}", model, facts=facts)
    write_page(out, heading, parts, [f"{kind}.csv"], neighbours(out, name), name)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return table(columns, [[escape(shown(cell)) for cell in row] for row in rows])
