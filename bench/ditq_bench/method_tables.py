"""The study's rows as people read them: Markdown tables and one chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETTINGS = (("w8", "static"), ("w8", "token"), ("w4p", "static"), ("w4p", "token"))
NAMES = {"w8": "W8A8", "w4p": "W4A8"}

Row = dict[str, Any]


def tables(rows: list[Row]) -> str:
    """Free and forced SQNR per method and setting, then the ablations: Markdown."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        parts.append(f"### {model}\n")
        parts.append(_methods([row for row in mine if row["table"] == "methods"]))
        ablations = [row for row in mine if row["table"] == "ablations"]
        if ablations:
            parts.append(_ablations(ablations))
    return "\n".join(parts)


def flow_table(rows: list[Row]) -> str:
    """Forced and free SQNR of every method on each flow model, and accuracy: Markdown."""
    lines = [
        "| forced / free SQNR, dB (accuracy) | W8A8 | W4A8 | W4A8, gptq and bias correction |",
        "|---|---|---|---|",
    ]
    columns = (("methods", "w8"), ("methods", "w4p"), ("fed back", "w4p"))
    found = {(r["model"], r["case"], r["table"], r["weights"]): r for r in rows}
    for model, case in dict.fromkeys((r["model"], r["case"]) for r in rows):
        cells = (_flow_cell(found.get((model, case, *column))) for column in columns)
        lines.append(f"| `{model}`, {case} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _flow_cell(row: Row | None) -> str:
    if row is None:
        return ""
    figures = f"{float(row['sqnr_forced_db']):.1f} / {float(row['sqnr_free_db']):.1f}"
    return f"{figures} ({float(row['accuracy']):.2f})"


def profile_table(rows: list[Row]) -> str:
    """Free and forced SQNR of the simulated profiles: Markdown."""
    lines = [
        "| simulated in float | model | weights | SQNR free / forced, dB | PSNR, accuracy |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        figures = f"{float(row['sqnr_free_db']):.1f} / {float(row['sqnr_forced_db']):.1f}"
        bits = NAMES[row["weights"]]
        lines.append(f"| {row['case']} | {row['model']} | {bits} | {figures} | {_rest(row)} |")
    return "\n".join(lines) + "\n"


def chart(path: Path, rows: list[Row]) -> None:
    """Free SQNR of every method, one panel per model, one bar per setting."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, grid = plt.subplots(
        1,
        len(models),
        figsize=(5 * len(models), 3.8),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axes, model in zip(grid[0], models, strict=True):
        mine = {
            _key(r): float(r["sqnr_free_db"])
            for r in rows
            if r["model"] == model and r["table"] == "methods"
        }
        names = list(dict.fromkeys(case for case, _, _ in mine))
        for i, setting in enumerate(SETTINGS):
            heights = [mine.get((name, *setting), 0.0) for name in names]
            places = [x + 0.2 * (i - 1.5) for x in range(len(names))]
            axes.bar(places, heights, 0.2, label=f"{NAMES[setting[0]]} {setting[1]}")
        axes.set_xticks(range(len(names)), names, rotation=30)
        axes.set(title=model, ylabel="mean free SQNR, dB")
        axes.grid(alpha=0.3, axis="y")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _key(row: Row) -> tuple[str, str, str]:
    return row["case"], row["weights"], row["activations"]


def _methods(rows: list[Row]) -> str:
    found = {_key(row): row for row in rows}
    heads = [f"{NAMES[weights]} {activations}" for weights, activations in SETTINGS]
    lines = [
        f"| free / forced SQNR, dB | {' | '.join(heads)} | W4A8 static: PSNR, accuracy, bytes, convert |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [found.get((case, *setting)) for setting in SETTINGS]
        figures = [
            f"{float(c['sqnr_free_db']):.1f} / {float(c['sqnr_forced_db']):.1f}" if c else ""
            for c in cells
        ]
        w4 = cells[2]
        rest = f"{_rest(w4)}, {int(w4['bytes']):,}, {w4['convert_seconds']} s" if w4 else ""
        lines.append(f"| {case} | {' | '.join(figures)} | {rest} |")
    return "\n".join(lines) + "\n"


def _ablations(rows: list[Row]) -> str:
    lines = [
        "| ablation, W4A8 static, modulation W8 | SQNR free / forced, dB | PSNR, accuracy |",
        "|---|---|---|",
    ]
    for row in rows:
        figures = f"{float(row['sqnr_free_db']):.1f} / {float(row['sqnr_forced_db']):.1f}"
        lines.append(f"| {row['case']} | {figures} | {_rest(row)} |")
    return "\n".join(lines) + "\n"


def _rest(row: Row) -> str:
    return f"{float(row['psnr_db']):.1f} dB, {float(row['accuracy']):.2f}"
