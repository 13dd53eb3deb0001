"""index.html of a report: every figure and plot on one page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ditq_converters.pages.origin import origin
from ditq_converters.pages.template import (
    Heading,
    details,
    note,
    picture,
    side_by_side,
    table,
    write_page,
)

CAPTIONS = {
    "sqnr.png": "Signal to quantization noise, per sampling step",
    "layers-cascade.png": "Where the error is: linears (not V, not modulation) on quantized inputs (cascade)",
    "layers-forced-block.png": "Where the error is made: every block, on the float model's input (forced)",
    "clip.png": "What the static activation ranges cut off",
    "sizes.png": "Bytes: packed on disk, float in memory",
}
SAMPLES = {
    "samples-float.png": "float",
    "samples-packed.png": "packed, equal seeds",
    "samples-difference.png": "difference, 8 times",
}
MODES = (
    "<b>free</b>: each model on its own trajectory from equal noise; of the guided prediction. "
    "<b>forced</b>: the packed model makes the very calls that the float model made; "
    "of each forward's output, before guidance. "
    "<b>Mean of ratios</b>: 10 log10 of the mean over samples of |f|&sup2; / |fq - f|&sup2;. <b>Ratio of sums</b>: "
    "10 log10 of sum |f|&sup2; / sum |fq - f|&sup2;. Both are averaged over steps in dB."
)


def write_report_page(
    out: Path, figures: dict[str, Any], pictures: list[str], links: Mapping[str, str]
) -> None:
    """Write index.html beside the pictures it shows."""
    grids = [picture(name, SAMPLES[name]) for name in pictures if name in SAMPLES]
    plots = [picture(name, CAPTIONS[name]) for name in pictures if name in CAPTIONS]
    parts = [
        *map(note, figures["notes"]),
        table(["measure", "value"], [[escape(what), value] for what, value in summary(figures)]),
        "<h2>Samples</h2>" if grids else "",
        side_by_side(grids, "samples"),
        "<h2>Error and size</h2>",
        side_by_side(plots),
        "<h2>SQNR conventions</h2>",
        f"<p>{MODES}</p>",
        _sqnr(figures["sqnr"]),
        "<h2>Layers, mean over steps</h2>",
        *(_layers(mode, errors) for mode, errors in figures["layers"].items()),
        _bytes(figures["bytes"]),
    ]
    facts = {
        "recipe": recipe_of(figures),
        "calls": calls_of(figures["settings"]),
        "made with": origin(figures["versions"], figures["seconds"]),
    }
    heading = Heading(
        "ditq eval", f"{figures['architecture']} against its float model", facts=facts
    )
    write_page(out, heading, parts, ["report.json", "sqnr.csv", "layers.csv"], links)


def recipe_of(figures: dict[str, Any]) -> str:
    """How a model was packed, in words."""
    recipe = figures["recipe"]
    known = [
        f"{key} {recipe[key]}" for key in ("method", "weights", "activations") if key in recipe
    ]
    return ", ".join(known) or "unknown"


def summary(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of the figures to read first; a dash where there is none."""
    rows = [
        (f"SQNR {name}, mean of ratios, dB", number(curve["mean_db"]))
        for name, curve in figures["sqnr"].items()
    ]
    images = figures["images"] or {}
    rows += [
        ("PSNR of the images, dB", number(images.get("psnr_db"))),
        ("SSIM of the images", number(images.get("ssim"), 4)),
        ("relative L2 of the final latents", number(figures["latents"]["relative_l2"], 4)),
    ]
    if images.get("lpips") is not None:
        rows.append(("LPIPS (AlexNet) of the images", number(images["lpips"], 4)))
    for distance in figures["frechet"]:
        what = f"{distance['name']} to the float model's samples, n = {distance['samples']}"
        rows.append((what, number(distance["value"], 4)))
    rows += _inception(figures["inception"])
    for name, score in (figures["demo"] or {}).items():
        whose = "the float model's digits" if name == "float" else "digits"
        rows.append((f"{whose}: accuracy", number(score["accuracy"], 3)))
        if score["digit_fd"] is not None:
            rows.append((f"{whose}: digit-FD to the real ones", number(score["digit_fd"])))
    if figures["clip_fraction"]:
        worst = max(figures["clip_fraction"].values())
        rows.append(("worst layer's share of inputs cut off, %", number(100 * worst, 3)))
    if figures["bytes"]["packed_total"] is not None:
        rows.append(("transformer on disk, MiB", number(figures["bytes"]["packed_total"] / 2**20)))
    rows.append(
        (
            "float model's transformer in memory, MiB",
            number(figures["bytes"]["float_in_memory"] / 2**20),
        )
    )
    return rows


def _inception(scores: dict[str, Any] | None) -> list[tuple[str, str]]:
    if scores is None:
        return []
    rows = [(f"Inception score, {k}", number(v, 3)) for k, v in scores["inception_score"].items()]
    rows += [
        (f"{k} towards the float model's images", number(scores[k], 3))
        for k in ("precision", "recall")
    ]
    return rows


def number(value: float | None, digits: int = 2) -> str:
    """A figure with `digits` decimals; a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def calls_of(settings: dict[str, Any]) -> str:
    """What was drawn, in words."""
    return (
        f"{settings['inputs']} inputs, the first {settings['few_samples']} samples also for forced SQNR and layers; "
        f"{settings['steps']} steps of {settings['sampler'] or 'its own sampler'}, seed {settings['seed']}"
    )


def _sqnr(curves: dict[str, Any]) -> str:
    rows = []
    for name, curve in curves.items():
        sums = curve["ratio_of_sums_db"]
        worst = min(curve["mean_of_ratios_db"])
        cells = (curve["mean_db"], sum(sums) / len(sums), worst)
        rows.append([escape(name), *(number(cell) for cell in cells)])
    return table(["mode", "mean of ratios, dB", "ratio of sums, dB", "worst step, dB"], rows)


def _layers(mode: str, errors: dict[str, float]) -> str:
    rows = [[escape(name), number(100 * error, 3)] for name, error in errors.items()]
    rows.sort(key=lambda row: -float(row[1]))
    return details(
        f"{mode}: {len(rows)} rows", table(["layer, worst first", "relative error, %"], rows)
    )


def _bytes(sizes: dict[str, Any]) -> str:
    if sizes["packed"] is None:
        return ""
    sides = {"float, in memory": sizes["float"], "packed, on disk": sizes["packed"]}
    return "<h2>Bytes by category</h2>" + bytes_table(sides)


def bytes_table(sides: Mapping[str, Mapping[str, int]]) -> str:
    """Name -> category -> bytes as a table; categories that nobody has are left out."""
    every = next(iter(sides.values()))
    named = [c for c in every if any(side[c] for side in sides.values())]
    rows = [[escape(c), *(f"{side[c]:,}" for side in sides.values())] for c in named]
    rows.append(["total bytes", *(f"{sum(side.values()):,}" for side in sides.values())])
    return table(["category", *sides], rows)
