"""The report folder: report.json, CSV tables, plots, and a page that shows them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ditq_converters.evaluate import plots
from ditq_converters.evaluate.judges import rgb, to_uint8
from ditq_converters.evaluate.layer_error import FORCED
from ditq_converters.evaluate.page import write_report_page
from ditq_converters.evaluate.records import Evaluation
from ditq_converters.pages.template import neighbours
from ditq_runtime.cli.images import grid
from ditq_runtime.files import atomic_file, atomic_folder, write_json

SHOWN, COLUMNS = 16, 4  # sample pairs in the picture
SIDE = 64  # smaller images are enlarged to it
MAGNIFIED = 8  # of their difference
LINEARS = "linears (not V, not modulation)"  # outputs of those carry factors


def write_report(out: Path, found: Evaluation) -> None:
    """Write the report folder: complete or not at all.

    Raises:
        FileExistsError: `out` is in use.
    """
    with atomic_folder(out) as part:
        write_files(part, found, neighbours(out))


def write_files(part: Path, found: Evaluation, links: Mapping[str, str]) -> None:
    """Everything of one report, in a folder that exists."""
    write_json(part / "report.json", found.figures)
    write_sqnr(part / "sqnr.csv", found)
    write_layers(part / "layers.csv", found)
    pictures = write_pictures(part, found)
    if found.clip[0]:
        write_clip(part / "clip.csv", found)
    write_report_page(part, found.figures, pictures, links)


def write_sqnr(path: Path, found: Evaluation) -> None:
    """One row per mode and timestep: both conventions, in dB."""
    rows = [
        [name, step, timestep, *pair]
        for name, curve in found.sqnr.items()
        for step, (timestep, *pair) in enumerate(
            zip(curve.timesteps, curve.mean_of_ratios, curve.ratio_of_sums, strict=True), 1
        )
    ]
    header = ["mode", "step", "timestep", "mean_of_ratios_db", "ratio_of_sums_db"]
    _write_csv(path, header, rows)


def write_layers(path: Path, found: Evaluation) -> None:
    """One row per mode, layer and step."""
    header = ["mode", "layer", "step", "timestep", "relative_error", "sqnr_db", "max_abs", "cosine"]
    rows = []
    for errors in found.layers:
        measures = torch.stack(
            [errors.relative, errors.sqnr_db, errors.max_abs, errors.cosine], dim=-1
        ).tolist()
        for name, steps in zip(errors.names, measures, strict=True):
            for step, (timestep, values) in enumerate(zip(found.timesteps, steps, strict=True), 1):
                rows.append([errors.mode, name, step, timestep, *values])
    _write_csv(path, header, rows)


def write_clip(path: Path, found: Evaluation) -> None:
    """One row per linear with static activations and step: share of inputs outside the codes' range."""
    rows = [
        [name, step, timestep, share]
        for name, shares in zip(found.clip[0], found.clip[1].tolist(), strict=True)
        for step, (timestep, share) in enumerate(zip(found.timesteps, shares, strict=True), 1)
    ]
    _write_csv(path, ["layer", "step", "timestep", "clip_fraction"], rows)


def write_pictures(out: Path, found: Evaluation) -> list[str]:
    """Every PNG of the report; returns their names, in the order to show them."""
    names = ["sqnr.png", "layers-cascade.png", "layers-forced-block.png"]
    curves = {name: curve.mean_of_ratios for name, curve in found.sqnr.items()}
    plots.sqnr_curves(out / "sqnr.png", curves, "packed against float: mean of ratios")
    for errors in found.layers:
        forced = errors.mode == FORCED
        name, what = (names[2], "every block") if forced else (names[1], LINEARS)
        title = f"error of {what}, {errors.mode}"
        plots.layer_heatmap(out / name, errors.names, errors.relative, title)
    if found.clip[0]:
        names.append("clip.png")
        title = "inputs outside the calibrated static range"
        plots.layer_heatmap(out / names[-1], *found.clip, title, "share of inputs cut off, %")
    if found.figures["bytes"]["packed"]:
        names.append("sizes.png")
        sizes = found.figures["bytes"]
        bars = {"float": sizes["float"], "packed": sizes["packed"]}
        plots.stacked_sizes(
            out / names[-1], bars, "the transformer: float in memory, packed on disk"
        )
    if found.images is not None:
        names = [*write_samples(out, found.images), *names]
    return names


def write_samples(out: Path, images: Mapping[str, torch.Tensor]) -> list[str]:
    """A grid each of the float model, the packed one and their difference, equal seeds at equal places; their names."""
    reference, others = (images[key][:SHOWN] for key in ("float", "packed"))
    difference = (MAGNIFIED * (others - reference).abs() - 1).clamp(-1, 1)
    panels = {"float": reference, "packed": others, "difference": difference}
    for name, batch in panels.items():
        write_grid(out / f"samples-{name}.png", batch)
    return [f"samples-{name}.png" for name in panels]


def write_grid(path: Path, images: torch.Tensor) -> None:
    """Images [S, C, H, W] in [-1, 1] as one picture."""
    scale = max(1, SIDE // images.shape[-1])
    tiles = [Image.fromarray(pixels) for pixels in uint8_nhwc(images[:SHOWN])]
    grid(tiles, COLUMNS, scale).save(path)


def uint8_nhwc(images: torch.Tensor) -> np.ndarray:
    """Images [S, 1 or 3, H, W] in [-1, 1] -> uint8 [S, H, W, 3]."""
    return to_uint8(rgb(images)).permute(0, 2, 3, 1).contiguous().numpy()


def write_npz(path: Path, images: torch.Tensor) -> None:
    """Write samples as ADM's evaluator reads them (Dhariwal and Nichol, guided-diffusion): uint8 NHWC `arr_0`.

    Args:
        path: to write, whole or not at all.
        images: [S, 1 or 3, H, W] float in [-1, 1]; one channel is repeated to three.
    """
    with atomic_file(path) as part, part.open("wb") as file:
        np.savez(file, arr_0=uint8_nhwc(images))


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
