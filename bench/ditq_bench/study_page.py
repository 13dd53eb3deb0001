"""Pages of the studies `ditq bench methods`, `flow`, `profiles`, `jitter` and `auto`: SQNR over bytes, and all rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch

from ditq_bench.auto_cases import AUTO
from ditq_bench.page import facts_of
from ditq_bench.plots import Place, plot_frontier
from ditq_bench.results import origin_of
from ditq_converters.pages.template import (
    Heading,
    details,
    neighbours,
    note,
    picture,
    side_by_side,
    table,
    write_page,
)

FEW = 12  # rows that are not folded
BITS = {"w8": "W8A8", "w4p": "W4A8"}
ONE = (
    "One conversion a row. In 4 bits, rounded to nearest, differences below 2 dB between two of them are the luck of "
    "rounding: ditq bench jitter measures it."
)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """What a page shows of a study's rows.

    Attributes:
        about: what was studied, a sentence.
        columns: field of a row -> its heading; rows are told apart by their `model`.
        place: of a row in the picture; None: it is not in it.
        measure: of the picture.
        doubt: what to know before figures are compared.
    """

    about: str
    columns: Mapping[str, str]
    place: Callable[[Row], Place | None] = lambda row: None
    measure: str = "forced SQNR, dB"
    doubt: str = ONE
    names: Sequence[str] = field(default=("ditq", "commit"))


def _of_method(row: Row) -> Place | None:
    if row["table"] == "ablations" or row["bytes"] == "":
        return None
    more = ", gptq" if row["table"] == "fed back" else ""
    kind = f"{BITS[row['weights']]} {row['activations']}{more}"
    return Place(row["case"], kind, float(row["bytes"]) / 1e6, float(row["sqnr_forced_db"]))


def _of_auto(row: Row) -> Place:
    method, _, bits = row["case"].rpartition(" ")
    if row["case"].startswith(AUTO):
        method, bits = "auto", "by budget"
    named = {"nearest": "smoothquant, nearest"}.get(method, method)
    return Place(named, bits, float(row["bytes"]) / 1e6, float(row["sqnr_guided_db"]))


CONVERTED = {
    "case": "case", "weights": "weights", "activations": "activations", "sqnr_free_db": "SQNR free, dB",
    "sqnr_forced_db": "SQNR forced, dB", "psnr_db": "PSNR, dB", "accuracy": "accuracy", "bytes": "bytes",
    "convert_seconds": "convert, s",
}  # fmt: skip
STUDIES = {
    "methods": Study("All methods in integers, and the ablations of their papers.", CONVERTED, _of_method),
    "flow": Study("All methods on models that take prompts, trained by rectified flow.", CONVERTED, _of_method),
    "profiles": Study(
        "The quantizers of the papers and of their code, simulated in float: nothing here runs in integers.",
        {name: title for name, title in CONVERTED.items() if name != "bytes"},
    ),
    "jitter": Study(
        "Methods with smoothing factors that are off by a few percent: the spread is the luck of rounding.",
        {
            "case": "case", "as_it_is_db": "as it is, dB", "mean_db": "mean, dB", "deviation_db": "deviation, dB",
            "seeds": "seeds", "amount": "off by",
        },
        doubt="",
    ),
    "auto": Study(
        "auto by budget, and single methods rounded by error feedback; means over calibrations.",
        {
            "case": "case", "sqnr_guided_db": "guided SQNR, dB", "least_guided_db": "least", "most_guided_db": "most",
            "sqnr_forced_db": "SQNR forced, dB", "accuracy": "accuracy", "bytes": "bytes", "repeats": "calibrations",
            "cpu_seconds": "CPU s",
        },
        _of_auto, "forced SQNR of the guided prediction, dB", "", ("commits",),
    ),
}  # fmt: skip


def write_study_page(out: Path, kind: str, rows: Sequence[Row]) -> Path:
    """Write KIND.html and its pictures beside KIND.csv; returns the page.

    Args:
        out: folder of the study.
        kind: of STUDIES.
        rows: with the columns of the study, and `model`.
    """
    study, models = STUDIES[kind], list(dict.fromkeys(row["model"] for row in rows))
    parts = [f"<p>{escape(study.about)}</p>", note(study.doubt) if study.doubt else ""]
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        places = [place for place in map(study.place, mine) if place]
        parts.append(f"<h2>{escape(model)}</h2>")
        if places:
            name = f"{kind}-{model.rpartition(':')[2]}.png"
            plot_frontier(out / name, places, f"{model}: SQNR over bytes", study.measure)
            parts.append(
                side_by_side([picture(name, "What no smaller checkpoint beats is joined")])
            )
        cells = [[_cell(name, row[name]) for name in study.columns] for row in mine]
        rows_of = table([*study.columns.values()], cells)
        parts.append(rows_of if len(mine) <= FEW else details(f"all {len(mine)} rows", rows_of))
    heading = Heading(f"ditq bench {kind}", ", ".join(models), facts=_facts(study, rows))
    name = f"{kind}.html"
    write_page(out, heading, parts, [f"{kind}.csv"], neighbours(out, name), name)
    return out / name


def _cell(name: str, value: Any) -> str:
    return f"{int(value):,}" if name == "bytes" and value != "" else escape(str(value))


def _facts(study: Study, rows: Sequence[Row]) -> dict[str, str]:
    """Who measured the rows, which may be older than this run, and where this run stands."""
    made = {" ".join(str(row.get(name, "")) for name in study.names).strip() for row in rows}
    told = ", ".join(sorted(filter(None, made))) or "an earlier version, which wrote none"
    return {"rows by": f"ditq, commit: {told}", **facts_of(origin_of(torch.device("cpu")))}
