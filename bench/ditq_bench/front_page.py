"""The picture of the README: SQNR over bytes of every method, and the demo's samples.

    python -m ditq_bench.front_page runs/demo docs/images/front_page.png

Bytes and SQNR are read from bench/results/methods.csv of this checkout, samples from a folder of `ditq demo`.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ditq_runtime.files import atomic_file

RESULTS = Path(__file__).parents[1] / "results" / "methods.csv"
COLOURS = {  # per token, meta is linear
    "linear": "#999999", "smoothquant": "#4477aa", "ditas": "#aa3377", "ptq4dit": "#228833",
    "htg": "#ee6677",
}  # fmt: skip
MARKS = {"w8": "o", "w4p": "s"}
NAMES = {"w8": "8-bit weights", "w4p": "4-bit weights"}
GAP, CAPTION = 12, 18  # of the demo's grid, in pixels


def rows(path: Path = RESULTS, model: str = "demo:digits") -> list[dict[str, str]]:
    """The methods' rows of one model with activations per token."""
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    keep = {"model": model, "table": "methods", "activations": "token"}
    return [row for row in found if all(row[key] == value for key, value in keep.items())]


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
        place = int(row["bytes"]) / 1e6, float(row["sqnr_free_db"])
        if row["case"] in COLOURS:
            axes.scatter(
                *place, s=80, color=COLOURS[row["case"]], marker=MARKS[row["weights"]], zorder=2
            )
    axes.set(
        xlabel="transformer on disk, MB (fp32, its embedder stored once: 8.0)", ylabel="SQNR, dB",
        title="demo:digits, each model on its own trajectory", xlim=(0, 4.2), ylim=(0, 50),
    )  # fmt: skip
    axes.grid(alpha=0.3)
    handles = [
        Line2D([], [], color=c, marker="D", linestyle="", label=n) for n, c in COLOURS.items()
    ]
    handles += [
        Line2D([], [], color="#333333", marker=m, linestyle="", label=NAMES[n])
        for n, m in MARKS.items()
    ]
    axes.legend(handles=handles, fontsize=9, loc="lower right", ncols=2)


def _samples(demo: Path) -> list[tuple[str, np.ndarray]]:
    """(title, two rows of digits) of the float, W8A8 and W4A8 model, cut from the demo's grid."""
    grid = np.asarray(Image.open(demo / "samples-digits.png").convert("L"))
    wide = (grid.shape[1] - 2 * GAP) // 3
    high = (grid.shape[0] - CAPTION) * 2 // 5
    parts = [grid[CAPTION : CAPTION + high, i * (wide + GAP) :][:, :wide] for i in range(3)]
    return list(zip(("float", "W8A8, same seeds", "W4A8, same seeds"), parts, strict=True))


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
