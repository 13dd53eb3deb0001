"""Pictures of benches: speed-up by shape and the roofline of kernels, SQNR over bytes of conversions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditq_bench.ceilings import Ceilings
from ditq_bench.measure import Row
from ditq_bench.results import Shape
from ditq_converters.pages.colours import colours_of
from ditq_converters.pages.figures import DOTS, WIDTH, in_our_fonts, wrapped
from ditq_runtime.files import atomic_file

MARKS = "os^vDP*Xp"


@dataclass(frozen=True)
class Place:
    """One conversion in a picture of SQNR over bytes.

    Attributes:
        method: has a colour.
        kind: of its weights and activations, has a mark.
        megabytes: on disk.
        decibels: of SQNR.
    """

    method: str
    kind: str
    megabytes: float
    decibels: float


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


@in_our_fonts
def plot_frontier(path: Path, places: Sequence[Place], title: str, measure: str) -> None:
    """SQNR over bytes: a colour per method, a mark per kind; what no smaller one beats is joined by a line."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    colours = colours_of(place.method for place in places)
    marks = dict(zip(dict.fromkeys(place.kind for place in places), MARKS, strict=False))
    lines = -(-(len(colours) + len(marks)) // 2)
    figure = Figure(figsize=(WIDTH, 3.6 + 0.18 * lines), layout="constrained")
    axes = figure.add_subplot()
    best = _unbeaten(places)
    at = [(place.megabytes, place.decibels) for place in best]
    axes.plot(*zip(*at, strict=True), color="#dddddd", zorder=0)
    for place in places:
        mark, colour = marks[place.kind], colours[place.method]
        axes.scatter(place.megabytes, place.decibels, s=36, marker=mark, color=colour)
    axes.set(xlabel="transformer on disk, MB", ylabel=measure)
    axes.set_title(wrapped(title))
    axes.grid(alpha=0.3)
    entries = {name: Line2D([], [], ls="", marker="o", color=c) for name, c in colours.items()}
    entries |= {
        kind: Line2D([], [], ls="", marker=m, color="black", fillstyle="none")
        for kind, m in marks.items()
    }
    figure.legend(entries.values(), entries, loc="outside lower left", ncols=2)
    _save(figure, path)


def _unbeaten(places: Sequence[Place]) -> list[Place]:
    """Places that have more SQNR than all that are as small or smaller, the smallest first."""
    found: list[Place] = []
    for place in sorted(places, key=lambda place: (place.megabytes, -place.decibels)):
        if not found or place.decibels > found[-1].decibels:
            found.append(place)
    return found


def _save(figure, path: Path) -> None:
    with atomic_file(path) as part:
        figure.savefig(part, dpi=DOTS, format="png")
