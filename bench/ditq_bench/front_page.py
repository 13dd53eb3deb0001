"""The picture of the README: SQNR over bytes of auto and of single methods, and the demo's samples.

    python -m ditq_bench.front_page runs/demo docs/images/front_page.png

Bytes and SQNR are read from bench/results/auto.csv of this checkout, samples from a folder of `ditq demo`.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ditq_bench.auto_cases import AUTO, NEAREST
from ditq_converters.pages.colours import FIXED
from ditq_runtime.files import atomic_file

RESULTS = Path(__file__).parents[1] / "results"
MODEL = "demo:digits"
METHODS = ("smoothquant", "osplus", "meta", "ditas")
ROWS = 2 * 32 + 2  # pixels: two rows of the demo's grids


def places(path: Path = RESULTS / "auto.csv", model: str = MODEL) -> dict[str, tuple[float, float]]:
    """Case -> (MB, forced SQNR in dB) of one model, smallest first; means where a case was tried repeatedly."""
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["model"] == model:
                place = float(row["bytes"]) / 1e6, float(row["sqnr_forced_db"])
                found.setdefault(row["case"], []).append(place)
    means = {case: tuple(np.mean(each, axis=0).tolist()) for case, each in found.items()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


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
    found = places()
    curve = [place for case, place in found.items() if case.startswith(AUTO)]
    axes.plot(*zip(*curve, strict=True), "o-", color="black", label="auto, by budget", zorder=3)
    nearest = [found[case] for case in NEAREST]
    label = "smoothquant, rounded to nearest, 4 and 8 bits"
    axes.scatter(*zip(*nearest, strict=True), s=80, marker="^", color="#ccbb44", label=label)
    for method in METHODS:
        both = [found[case] for case in (f"{method} w4p", f"{method} w8") if case in found]
        if not both:
            continue
        label = f"{method} with GPTQ, {'4 and 8' if len(both) > 1 else '4'} bits"
        axes.scatter(*zip(*both, strict=True), s=80, marker="s", color=FIXED[method], label=label)
    axes.set(
        xlabel="transformer on disk, MB (fp32, its embedder stored once: 8.0)",
        ylabel="forced SQNR before guidance, dB",
        title="demo:digits: what a checkpoint costs and keeps", xlim=(0, 3), ylim=(20, 60),
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower right")


def _samples(demo: Path) -> list[tuple[str, np.ndarray]]:
    """(title, two rows of digits) of the float, W8A8 and W4A8 model."""
    titles = {"float": "float", "w8a8": "W8A8, same seeds", "w4a8": "W4A8, same seeds"}
    grids = (Image.open(demo / f"samples-digits-{name}.png").convert("L") for name in titles)
    return [(t, np.asarray(grid)[:ROWS]) for t, grid in zip(titles.values(), grids, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the README's picture.")
    parser.add_argument("demo", type=Path, help="folder that `ditq demo --out` wrote")
    parser.add_argument("target", type=Path, help="PNG to write")
    draw(**vars(parser.parse_args()))
