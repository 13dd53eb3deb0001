"""Two pictures of one run of `ditq bench kernels`: speed-up by shape, and the roofline."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ditq_bench.ceilings import Ceilings
from ditq_bench.measure import Row
from ditq_bench.results import Shape
from ditq_converters.pages.colours import colours_of
from ditq_converters.pages.figures import DOTS, WIDTH, in_our_fonts, wrapped
from ditq_runtime.files import atomic_file

MARKS = "os^vDP*Xp"


@in_our_fonts
def plot_speedup(path: Path, rows: list[tuple[Shape, Row]], device: str) -> None:
    """Bars: median of torch bf16 over the candidate's, per shape; a quantizer alone is no rival and has none."""
    from matplotlib.figure import Figure

    rows = [(shape, row) for shape, row in rows if row.computes]
    shapes = list(dict.fromkeys(shape.name for shape, _ in rows))
    colours = colours_of(row.candidate for _, row in rows)
    height = 0.16 * len(rows) + 0.15 * len(shapes) + 0.17 * len(colours) + 1.2
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    at, middles, known = 0.0, [], set()
    for name in shapes:
        bars = [row for shape, row in rows if shape.name == name]
        middles.append(at + (len(bars) - 1) / 2)
        for row in bars:
            label = "" if row.candidate in known else row.candidate
            known.add(row.candidate)
            axes.barh(at, row.speedup_bf16, 0.9, color=colours[row.candidate], label=label)
            at += 1
        at += 1
    axes.margins(y=0.01)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(middles, shapes)
    axes.invert_yaxis()
    axes.set_xlabel("speed over torch bf16, same run")
    axes.set_title(wrapped(device))
    figure.legend(loc="outside lower left", ncols=2)
    _save(figure, path)


@in_our_fonts
def plot_roofline(
    path: Path, rows: list[tuple[Shape, Row]], ceilings: Ceilings, device: str
) -> None:
    """Operations per second over operations per byte, under the ceilings measured in the run."""
    from matplotlib.figure import Figure

    rows = [(shape, row) for shape, row in rows if row.computes]
    colors = colours_of(row.candidate for _, row in rows)
    figure = Figure(figsize=(WIDTH, 3.8 + 0.1 * len(colors)), layout="constrained")
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
    axes.set_title(wrapped(f"{device}: measured ceilings (lines) and medians"))
    figure.legend(loc="outside lower left", ncols=2)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    with atomic_file(path) as part:
        figure.savefig(part, dpi=DOTS, format="png")
