"""The rows of the study of auto as means over calibrations, and as a picture: SQNR over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditq_bench.auto_cases import AUTO, FLOATS, NEAREST, ON_THE_FLY, SINGLE, SINGLES
from ditq_converters.pages.colours import FIXED
from ditq_runtime.files import atomic_file

MEASURED = ("sqnr_guided_db", "sqnr_forced_db", "sqnr_free_db", "accuracy", "bytes", "cpu_seconds")
FIELDS = ("model", "case", "repeats", *MEASURED, "least_guided_db", "most_guided_db", "commits")
AXIS = "transformer on disk, MB"

Row = dict[str, Any]


def means(rows: Sequence[Row]) -> list[Row]:
    """One row per model and case: means over repeats, and the least and most of the guided SQNR."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["case"]), []).append(row)
    return [_mean(model, case, parts) for (model, case), parts in found.items()]


def _mean(model: str, case: str, rows: list[Row]) -> Row:
    measured = {name: [float(row[name]) for row in rows if row[name] != ""] for name in MEASURED}
    guided = measured["sqnr_guided_db"]
    return {
        "model": model,
        "case": case,
        "repeats": len(rows),
        **{
            name: f"{sum(values) / len(values):.{0 if name == 'bytes' else 2}f}" if values else ""
            for name, values in measured.items()
        },
        "least_guided_db": f"{min(guided):.2f}",
        "most_guided_db": f"{max(guided):.2f}",
        "commits": " ".join(dict.fromkeys(row["commit"] for row in rows)),
    }


def write_means(path: Path, rows: Sequence[Row]) -> None:
    """`means` as CSV, atomically."""
    lines = [",".join(FIELDS), *(",".join(str(row[n]) for n in FIELDS) for row in means(rows))]
    with atomic_file(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(path: Path, rows: Sequence[Row], models: Sequence[str]) -> None:
    """Guided SQNR over bytes, a panel per model: auto as a line, single methods as points.

    Args:
        path: of the PNG.
        rows: of `means`.
        models: panels, from left to right.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(models), 4.4), layout="constrained")
    panels: Any = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        _panel(axes, [row for row in rows if row["model"] == model])
        axes.set(title=model, xlabel=AXIS)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("forced SQNR of the guided prediction, dB")
    entries = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=5, fontsize=9)
    with atomic_file(path) as part:
        figure.savefig(part, dpi=110, format="png")


def _panel(axes: Any, rows: list[Row]) -> None:
    own = [row for row in rows if row["case"].startswith(AUTO)]
    curve = sorted(_place(row) for row in own if FLOATS not in row["case"])
    if curve:
        axes.plot(*zip(*curve, strict=True), "o-", color="black", label="auto", zorder=3)
    floats = [row["case"] for row in own if FLOATS in row["case"]]
    _points(axes, rows, "auto, some float activations", floats, "o", "#888888")
    for method in SINGLE:
        cases = [f"{method} {weights}" for weights in ("w4p", "w8")]
        _points(axes, rows, f"{method}, gptq", cases, "s", FIXED[method])
    _points(axes, rows, "smoothquant, nearest", list(NEAREST), "^", "#ccbb44")
    _points(axes, rows, "on the fly", list(ON_THE_FLY), "v", "#ccbb44")
    assert set(SINGLES) == {f"{method} {w}" for method in SINGLE for w in ("w4p", "w8")}


def _points(
    axes: Any, rows: list[Row], label: str, cases: list[str], mark: str, colour: str
) -> None:
    places = [_place(row) for row in rows if row["case"] in cases]
    if places:
        axes.scatter(*zip(*places, strict=True), s=45, marker=mark, color=colour, label=label)


def _place(row: Row) -> tuple[float, float]:
    return float(row["bytes"]) / 1e6, float(row["sqnr_guided_db"])
