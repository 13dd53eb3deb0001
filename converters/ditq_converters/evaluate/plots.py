"""The figures of a report, one function each; every one writes a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.image import AxesImage

PALETTE = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777", "#000000", "#ee9944",
    "#774411",
)  # fmt: skip


def sqnr_curves(path: Path, curves: Mapping[str, Sequence[float]], title: str) -> None:
    """SQNR in dB over sampling steps, one line per model; step 1 is the noisiest."""
    figure, axes = plt.subplots(figsize=(8, 4.2 + 0.1 * len(curves)), layout="constrained")
    for (name, values), color in zip(curves.items(), PALETTE, strict=False):
        mean = sum(values) / len(values)
        axes.plot(
            range(1, len(values) + 1), values, color=color, label=f"{name} (mean {mean:.1f} dB)"
        )
    axes.set(
        xlabel="sampling step (1 = noisiest)",
        ylabel="SQNR of the noise prediction, dB",
        title=title,
    )
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    _save(figure, path)


def layer_heatmap(
    path: Path,
    names: Sequence[str],
    errors: torch.Tensor,
    title: str,
    label: str = "relative error of the output, %",
) -> None:
    """A share, by default the relative error, of every layer at every step.

    Args:
        path: PNG to write.
        names: of the rows.
        errors: [rows, steps], drawn in percent.
        title: of the figure.
        label: of the colours.
    """
    figure, axes = plt.subplots(figsize=(9, 0.2 * len(names) + 1.6), layout="constrained")
    image = _per_step(axes, 100 * errors, "magma")
    axes.set_yticks(
        range(len(names)), [name.removeprefix("transformer_blocks.") for name in names], fontsize=7
    )
    axes.set(xlabel="sampling step (1 = noisiest)", title=title)
    figure.colorbar(image, ax=axes, label=label)
    _save(figure, path)


def activation_ranges(path: Path, panels: Mapping[str, torch.Tensor], title: str) -> None:
    """Largest |x| per channel and step, channels sorted by their overall range.

    Args:
        path: PNG to write.
        panels: name -> [T, K] absmax.
        title: of the figure.
    """
    figure, grid = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for axes, (name, absmax) in zip(grid[0], panels.items(), strict=True):
        order = absmax.amax(0).argsort(descending=True)
        image = _per_step(axes, absmax[:, order].T.log10(), "viridis")
        spread = absmax.amax(0)
        ratio = float(spread.max() / spread.median())
        axes.set(xlabel="sampling step (1 = noisiest)", ylabel="channel, widest first")
        axes.set_title(f"{name}\nwidest / median channel: {ratio:.1f}", fontsize=10)
        figure.colorbar(image, ax=axes, label="log10 of largest |x|")
    figure.suptitle(title)
    _save(figure, path)


def range_drift(path: Path, ranges: Mapping[str, torch.Tensor], title: str) -> None:
    """How the range of a whole input moves over the steps, one line per input.

    Args:
        path: PNG to write.
        ranges: name -> [T] absmax over channels.
        title: of the figure.
    """
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for (name, values), color in zip(ranges.items(), PALETTE, strict=False):
        axes.plot(range(1, len(values) + 1), values.tolist(), color=color, label=name)
    axes.set(xlabel="sampling step (1 = noisiest)", ylabel="largest |x|", title=title, yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    _save(figure, path)


def stacked_sizes(path: Path, sizes: Mapping[str, Mapping[str, int]], title: str) -> None:
    """Bytes on disk by category, one bar per model."""
    named = (category for parts in sizes.values() for category, size in parts.items() if size)
    categories = list(dict.fromkeys(named))
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(sizes) + 2.2), layout="constrained")
    left = dict.fromkeys(sizes, 0.0)
    for category, color in zip(categories, PALETTE[: len(categories)], strict=True):
        widths = [parts.get(category, 0) / 2**20 for parts in sizes.values()]
        axes.barh(list(sizes), widths, left=list(left.values()), color=color, label=category)
        left = {name: left[name] + width for name, width in zip(sizes, widths, strict=True)}
    axes.invert_yaxis()
    axes.set(xlabel="MiB on disk", title=title)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    _save(figure, path)


def _per_step(axes: plt.Axes, values: torch.Tensor, cmap: str) -> AxesImage:
    """Draw [rows, steps] as an image whose columns are numbered from 1."""
    rows, steps = values.shape
    box = (0.5, steps + 0.5, rows - 0.5, -0.5)
    return axes.imshow(
        values.numpy(), aspect="auto", cmap=cmap, interpolation="nearest", extent=box
    )


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
