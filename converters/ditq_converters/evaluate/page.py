"""index.html of a report: every figure and plot on one page that needs no network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .3em .8em; border-bottom: 1px solid #ddd; }
td { text-align: right; } td:first-child, th:first-child { text-align: left; } th { text-align: right; }
img { max-width: 100%; margin: .5em 0; } .note { background: #f4f4f4; padding: .6em 1em; } h2 { margin-top: 2em; }
"""
CAPTIONS = {
    "samples.png": "Equal seeds: float, packed, difference",
    "sqnr.png": "Signal to quantization noise, per sampling step",
    "layers-cascade.png": "Where the error is: linears (not V, not modulation) on quantized inputs (cascade)",
    "layers-forced-block.png": "Where the error is made: every block, on the float model's input (forced)",
    "clip.png": "What the static activation ranges cut off",
    "sizes.png": "Bytes on disk",
}
MODES = (
    "<b>free</b>: each model on its own trajectory from equal noise; of the guided prediction. "
    "<b>forced</b>: the packed model makes the very calls that the float model made; "
    "of each forward's output, before guidance. "
    "<b>Mean of ratios</b>: 10 log10 of the mean over samples of |f|&sup2; / |fq - f|&sup2;. <b>Ratio of sums</b>: "
    "10 log10 of sum |f|&sup2; / sum |fq - f|&sup2;. Both are averaged over steps in dB."
)


def write_page(out: Path, figures: dict[str, Any], pictures: list[str]) -> None:
    """Write index.html beside the pictures it shows."""
    recipe = figures["recipe"]
    made = ", ".join(
        f"{key} {recipe[key]}" for key in ("method", "weights", "activations") if key in recipe
    )
    parts = [
        "<h1>ditq eval</h1>",
        f"<p>{escape(figures['architecture'])}, packed with {escape(made or 'an unknown recipe')}, against its "
        f"float model. {_settings(figures['settings'])}</p>",
        *(f'<p class="note">{escape(note)}</p>' for note in figures["notes"]),
        _summary(figures),
        *(f"<h2>{CAPTIONS[name]}</h2>{_image(name)}" for name in pictures),
        "<h2>SQNR conventions</h2>",
        f"<p>{MODES}</p>",
        _sqnr(figures["sqnr"]),
        "<h2>Layers, mean over steps</h2>",
        *(_layers(mode, errors) for mode, errors in figures["layers"].items()),
        _bytes(figures["bytes"]),
        f"<p>{escape(str(figures['versions']))}; {figures['seconds']:.0f} s in all; all figures in "
        "report.json, sqnr.csv and layers.csv.</p>",
    ]
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>ditq eval</title><style>{STYLE}</style>"
    (out / "index.html").write_text(
        head + "\n".join(part for part in parts if part) + "</html>\n", encoding="utf-8"
    )


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
        rows.append((f"{name}: accuracy", number(score["accuracy"], 3)))
        rows.append((f"{name}: digit-FD", number(score["digit_fd"])))
    if figures["clip_fraction"]:
        worst = max(figures["clip_fraction"].values())
        rows.append(("worst layer's share of inputs cut off, %", number(100 * worst, 3)))
    if figures["bytes"]["packed_total"] is not None:
        rows.append(
            ("packed transformer on disk, MiB", number(figures["bytes"]["packed_total"] / 2**20))
        )
    rows.append(
        ("float transformer in memory, MiB", number(figures["bytes"]["float_in_memory"] / 2**20))
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


def _summary(figures: dict[str, Any]) -> str:
    return _table(["measure", "value"], [[escape(what), value] for what, value in summary(figures)])


def _settings(settings: dict[str, Any]) -> str:
    sampler = settings["sampler"] or "the pipeline's own sampler"
    return (
        f"{settings['inputs']} calls, the first {settings['few_samples']} samples for forced SQNR and layers; "
        f"{settings['steps']} steps of {escape(sampler)}, seed {settings['seed']}."
    )


def _sqnr(curves: dict[str, Any]) -> str:
    rows = []
    for name, curve in curves.items():
        sums = curve["ratio_of_sums_db"]
        worst = min(curve["mean_of_ratios_db"])
        cells = (curve["mean_db"], sum(sums) / len(sums), worst)
        rows.append([escape(name), *(number(cell) for cell in cells)])
    return _table(["mode", "mean of ratios, dB", "ratio of sums, dB", "worst step, dB"], rows)


def _layers(mode: str, errors: dict[str, float]) -> str:
    rows = [[escape(name), number(100 * error, 3)] for name, error in errors.items()]
    rows.sort(key=lambda row: -float(row[1]))
    table = _table(["layer, worst first", "relative error, %"], rows)
    return f"<details><summary>{escape(mode)}: {len(rows)} rows</summary>{table}</details>"


def _bytes(sizes: dict[str, Any]) -> str:
    if sizes["packed"] is None:
        return ""
    rows = [[escape(name), f"{size:,}"] for name, size in sizes["packed"].items() if size]
    rows.append(["total", f"{sizes['packed_total']:,}"])
    return "<h2>Bytes by category</h2>" + _table(["category", "bytes on disk"], rows)


def _image(name: str) -> str:
    return f'<p><a href="{name}"><img src="{name}" alt="{escape(CAPTIONS[name])}"></a></p>'


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
