"""Two pictures of one run of `ditq bench kernels`: speed-up by shape, and the roofline."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ditq_bench.ceilings import Ceilings
from ditq_bench.measure import Row
from ditq_bench.results import Shape
from ditq_runtime.files import atomic_file

MARKS = "os^vDP*Xp"


def plot_speedup(path: Path, rows: list[tuple[Shape, Row]], device: str) -> None:
    """Bars: median of torch bf16 over the candidate's, per shape; a quantizer alone is no rival and has none."""
    from matplotlib.figure import Figure

    rows = [(shape, row) for shape, row in rows if row.computes]
    shapes = list(dict.fromkeys(shape.name for shape, _ in rows))
    colors = _colors(rows)
    figure = Figure(figsize=(5 + 1.6 * len(shapes), 5), layout="constrained")
    axes = figure.add_subplot()
    for at, name in enumerate(shapes):
        bars = [row for shape, row in rows if shape.name == name]
        for index, row in enumerate(bars):
            left = at + 0.8 * ((index + 0.5) / len(bars) - 0.5)
            label = (
                row.candidate if row.candidate not in axes.get_legend_handles_labels()[1] else ""
            )
            axes.bar(
                left, row.speedup_bf16, 0.8 / len(bars), color=colors[row.candidate], label=label
            )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel("speed over torch bf16, same run")
    axes.set_title(device, fontsize=10)
    figure.legend(fontsize=7, loc="outside right upper")
    _save(figure, path)


def plot_roofline(
    path: Path, rows: list[tuple[Shape, Row]], ceilings: Ceilings, device: str
) -> None:
    """Operations per second over operations per byte, under the ceilings measured in the run."""
    from matplotlib.figure import Figure

    rows = [(shape, row) for shape, row in rows if row.computes]
    colors = _colors(rows)
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.add_subplot()
    intensities = [shape.operations / row.num_bytes for shape, row in rows]
    x = np.geomspace(min(intensities) / 3, max(intensities) * 3, 200)
    for rate in sorted(set(ceilings.rates.values())):
        kinds = ", ".join(kind for kind, other in ceilings.rates.items() if other == rate)
        axes.plot(x, np.minimum(x * ceilings.bandwidth, rate) / 1e12, linewidth=1, color="grey")
        axes.annotate(kinds, (x[0], rate / 1e12), fontsize=8, color="grey", va="bottom")
    for index, (name, color) in enumerate(colors.items()):
        points = [
            (shape.operations / row.num_bytes, row.tops)
            for shape, row in rows
            if row.candidate == name
        ]
        x_points, y_points = np.array(points).T
        mark = MARKS[index % len(MARKS)]
        axes.scatter(x_points, y_points, color=color, marker=mark, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("1e12 operations per second")
    axes.set_title(f"{device}: measured ceilings (lines) and medians", fontsize=10)
    figure.legend(fontsize=7, loc="outside right upper")
    _save(figure, path)


def _colors(rows: list[tuple[Shape, Row]]) -> dict[str, tuple]:
    from matplotlib import colormaps

    names = list(dict.fromkeys(row.candidate for _, row in rows))
    return {name: colormaps["tab20"](index % 20) for index, name in enumerate(names)}


def _save(figure, path: Path) -> None:
    with atomic_file(path) as part:
        figure.savefig(part, dpi=120, format="png")
