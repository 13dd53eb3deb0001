"""The figures of a report, one function each; every one writes a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch

from ditq_converters.pages.colours import colours_of
from ditq_converters.pages.figures import DOTS, WIDTH, in_our_fonts, wrapped

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import Normalize
from matplotlib.image import AxesImage

ROWS = 60  # of a heat map


@in_our_fonts
def sqnr_curves(path: Path, curves: Mapping[str, Sequence[float]], title: str) -> None:
    """SQNR in dB over sampling steps, one line per model; step 1 is the noisiest."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2 + 0.2 * len(curves)), layout="constrained")
    colours = colours_of(curves)
    for name, values in curves.items():
        label = f"{name} (mean {sum(values) / len(values):.1f} dB)"
        axes.plot(range(1, len(values) + 1), values, color=colours[name], label=label)
    axes.set(xlabel="sampling step (1 = noisiest)", ylabel="SQNR of the prediction, dB")
    axes.set_title(wrapped(title))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower left", ncols=1)
    _save(figure, path)


@in_our_fonts
def layer_heatmap(
    path: Path,
    names: Sequence[str],
    errors: torch.Tensor,
    title: str,
    label: str = "relative error of the output, %",
) -> None:
    """A share, by default the relative error, of every layer at every step; of more than ROWS layers the worst.

    Args:
        path: PNG to write.
        names: of the rows.
        errors: [rows, steps], drawn in percent.
        title: of the figure.
        label: of the colours.
    """
    if len(names) > ROWS:
        worst = errors.nanmean(1).argsort(descending=True)[:ROWS].sort().values
        title = f"{title}; the {ROWS} worst of {len(names)}"
        names, errors = [names[i] for i in worst], errors[worst]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.17 * len(names) + 1.8), layout="constrained")
    image = _per_step(axes, 100 * errors, "magma")
    axes.set_yticks(range(len(names)), [n.removeprefix("transformer_blocks.") for n in names])
    axes.set(xlabel="sampling step (1 = noisiest)")
    axes.set_title(wrapped(title), loc="right")
    figure.colorbar(image, ax=axes, label=label, location="bottom", aspect=40)
    _save(figure, path)


@in_our_fonts
def activation_ranges(path: Path, panels: Mapping[str, torch.Tensor], title: str) -> None:
    """Largest |x| per channel and step, channels sorted by their overall range.

    Args:
        path: PNG to write.
        panels: name -> [T, K] absmax.
        title: of the figure.
    """
    rows = -(-len(panels) // 2)
    figure, grid = plt.subplots(
        rows, 2, figsize=(WIDTH, 2.3 * rows + 0.9), layout="constrained", squeeze=False, sharex=True
    )
    shown = {name: _widest_first(absmax) for name, absmax in panels.items()}
    low = min(float(values.min()) for values in shown.values())
    high = max(float(values.max()) for values in shown.values())
    for axes, (name, values) in zip(grid.flat, shown.items(), strict=False):
        image = _per_step(axes, values, "viridis", Normalize(low, high))
        spread = panels[name].amax(0)
        ratio = float(spread.max() / spread.median())
        axes.set_title(f"{name}: widest / median {ratio:.1f}", fontsize=9)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("sampling step (1 = noisiest)", fontsize=8)
    figure.supylabel("channel, widest first", fontsize=9)
    figure.colorbar(image, ax=grid, label="log10 of largest |x|", location="bottom", aspect=40)
    figure.suptitle(wrapped(title))
    _save(figure, path)


@in_our_fonts
def range_drift(path: Path, ranges: Mapping[str, torch.Tensor], title: str) -> None:
    """How the range of a whole input moves over the steps, one line per input.

    Args:
        path: PNG to write.
        ranges: name -> [T] absmax over channels.
        title: of the figure.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    colours = colours_of(ranges)
    for name, values in ranges.items():
        axes.plot(range(1, len(values) + 1), values.tolist(), color=colours[name], label=name)
    axes.set(xlabel="sampling step (1 = noisiest)", ylabel="largest |x|", yscale="log")
    axes.set_title(wrapped(title))
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=4)
    _save(figure, path)


@in_our_fonts
def stacked_sizes(path: Path, sizes: Mapping[str, Mapping[str, int]], title: str) -> None:
    """Bytes by category, one bar per model."""
    named = (category for parts in sizes.values() for category, size in parts.items() if size)
    colours = colours_of(named)
    height = 0.35 * len(sizes) + 1.4 + 0.17 * len(colours)
    figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    left = dict.fromkeys(sizes, 0.0)
    for category, colour in colours.items():
        widths = [parts.get(category, 0) / 2**20 for parts in sizes.values()]
        axes.barh(list(sizes), widths, left=list(left.values()), color=colour, label=category)
        left = {name: left[name] + width for name, width in zip(sizes, widths, strict=True)}
    axes.invert_yaxis()
    axes.set(xlabel="MiB")
    axes.set_title(wrapped(title))
    figure.legend(loc="outside lower left", ncols=2)
    _save(figure, path)


def _widest_first(absmax: torch.Tensor) -> torch.Tensor:
    """[T, K] largest |x| -> [K, T] its decimal logarithm; channels that never move stand at the least that moves."""
    order = absmax.amax(0).argsort(descending=True)
    values = absmax[:, order].T
    return values.clamp(min=float(values[values > 0].min())).log10()


def _per_step(
    axes: plt.Axes, values: torch.Tensor, cmap: str, norm: Normalize | None = None
) -> AxesImage:
    """Draw [rows, steps] as an image whose columns are numbered from 1."""
    rows, steps = values.shape
    box = (0.5, steps + 0.5, rows - 0.5, -0.5)
    return axes.imshow(
        values.numpy(), aspect="auto", cmap=cmap, norm=norm, interpolation="nearest", extent=box
    )


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=DOTS)
    plt.close(figure)
