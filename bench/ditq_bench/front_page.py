"""The picture of the README: SQNR over bytes of every method and of auto, and the demo's samples.

    python -m ditq_bench.front_page runs/demo docs/images/front_page.png

Bytes and SQNR are read from bench/results/methods.csv and auto.csv of this checkout, samples from a folder of
`ditq demo`.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ditq_runtime.files import atomic_file

RESULTS = Path(__file__).parents[1] / "results"
MODEL = "demo:digits"
COLOURS = {  # per token, meta is linear
    "linear": "#999999", "smoothquant": "#4477aa", "ditas": "#aa3377", "ptq4dit": "#228833",
    "htg": "#ee6677",
}  # fmt: skip
MARKS = {"w8": "o", "w4p": "s"}
NAMES = {"w8": "8-bit weights", "w4p": "4-bit weights"}
ROWS = 2 * 32 + 2  # pixels: two rows of the demo's grids


def rows(path: Path = RESULTS / "methods.csv", model: str = MODEL) -> list[dict[str, str]]:
    """The methods' rows of one model with activations per token."""
    keep = {"model": model, "table": "methods", "activations": "token"}
    return [row for row in _read(path) if all(row[key] == value for key, value in keep.items())]


def frontier(path: Path = RESULTS / "auto.csv", model: str = MODEL) -> list[tuple[float, float]]:
    """(MB, forced SQNR in dB) of auto at every budget, smallest first; means where a budget was tried repeatedly."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in _read(path):
        if row["model"] == model and row["case"].startswith("auto"):
            place = float(row["bytes"]) / 1e6, float(row["sqnr_forced_db"])
            found.setdefault(row["case"], []).append(place)
    means = (np.mean(places, axis=0).tolist() for places in found.values())
    return sorted((size, sqnr) for size, sqnr in means)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw(demo: Path, target: Path) -> None:
    """Write the picture, 1200 pixels wide, as a PNG of a few colours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left, right = halves
    _frontier(left.add_subplot())
    for axes, (name, image) in zip(right.subplots(3, 1), _samples(demo), strict=True):
        axes.imshow(image, cmap="gray")
        axes.set_axis_off()
        axes.set_title(name, fontsize=11)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as part:
        figure.savefig(part, dpi=100, format="png")
        Image.open(part).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(part, "PNG")


def _frontier(axes: Any) -> None:
    from matplotlib.lines import Line2D

    for row in rows():
        place = int(row["bytes"]) / 1e6, float(row["sqnr_forced_db"])
        if row["case"] in COLOURS:
            axes.scatter(
                *place, s=80, color=COLOURS[row["case"]], marker=MARKS[row["weights"]], zorder=2
            )
    axes.set(
        xlabel="transformer on disk, MB (fp32, its embedder stored once: 8.0)", ylabel="forced SQNR, dB",
        title="demo:digits: what a checkpoint costs and keeps", xlim=(0, 4), ylim=(20, 60),
    )  # fmt: skip
    axes.plot(*zip(*frontier(), strict=True), "o-", color="black", label="auto", zorder=3)
    axes.grid(alpha=0.3)
    handles = [Line2D([], [], color="black", marker="o", label="auto, by budget")]
    handles += [
        Line2D([], [], color=c, marker="D", linestyle="", label=n) for n, c in COLOURS.items()
    ]
    handles += [
        Line2D([], [], color="#333333", marker=m, linestyle="", label=NAMES[n])
        for n, m in MARKS.items()
    ]
    axes.legend(handles=handles, fontsize=9, loc="lower right", ncols=2)


def _samples(demo: Path) -> list[tuple[str, np.ndarray]]:
    """(title, two rows of digits) of the float, W8A8 and W4A8 model."""
    titles = {"float": "float", "w8a8": "W8A8, same seeds", "w4a8": "W4A8, same seeds"}
    grids = (Image.open(demo / f"samples-digits-{name}.png").convert("L") for name in titles)
    return [(t, np.asarray(grid)[:ROWS]) for t, grid in zip(titles.values(), grids, strict=True)]


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
