"""A paper's table again, in integers, on a checkpoint that the user has: its protocol, its published figures beside.

    ditq bench papers dit-256 facebook/DiT-XL-2-256 --out runs/dit-256

The published figures were taken with simulated quantizers in float, finer than a kernel runs (DiTAS: a scale for 32
weights), and each paper has its own full-precision baseline: differences below about 0.7 FID between papers mean
nothing. FID is that of the ADM evaluation suite, which reads the .npz of every row and the ImageNet reference batch;
SQNR is measured here. Killed, the same command goes on after the last finished row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditq_converters import Recipe, calibrate, convert
from ditq_converters.evaluate import EvaluationSettings, evaluate
from ditq_converters.evaluate.report import write_npz
from ditq_runtime.calls.pipeline import with_transformers
from ditq_runtime.files import write_json
from ditq_runtime.format.folder import open_folder

STATIC: dict[str, Any] = {  # both papers quantize what AdaLN linears read, too
    "weights": "w4p", "activations": "static", "modulation_activations": "static",
}  # fmt: skip
QUANTILES = {"range_method": "ptq4dit_pct", "weight_range_method": "ptq4dit_pct"}
HTG: dict[str, Any] = {"method": "htg", "range_method": "qdiff_mse", "groups_per_layer": True}
LEARNED: dict[str, Any] = {"rounding": "reconstruct", "iterations": 20000, "bias_correction": True}


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        case: its name.
        recipe: how ditq comes closest.
        published: the paper's figure, in the table's measure.
        samples: that the paper calibrates on.
    """

    case: str
    recipe: dict[str, Any]
    published: str
    samples: int = 32


@dataclass(frozen=True)
class Table:
    """A protocol.

    Attributes:
        title: the model, the sampler and the size of it.
        measure: what the published figures are.
        baseline: of the full-precision model, in it.
        steps: of the sampler.
        guidance: its weight.
        sampler: a name of `ditq_runtime.calls.schedulers.SAMPLERS`.
        samples: that the figures are taken on.
        rows: what is compared.
        prompts: it is conditioned on text.
    """

    title: str
    measure: str
    baseline: str
    steps: int
    guidance: float
    sampler: str
    samples: int
    rows: tuple[Row, ...]
    prompts: bool = False


def _rows(w4: tuple[str, str, str], w8: tuple[str, str, str] | None) -> tuple[Row, ...]:
    """DiTAS (arXiv:2409.07756), HTG (arXiv:2503.06930) and PTQ4DiT (arXiv:2405.16005)."""
    four = (
        Row("DiTAS W4A8", {"method": "ditas", "weights": "w4p"}, w4[0], samples=12),
        Row("HTG W4A8", {**HTG, **STATIC}, w4[1]),
        Row("PTQ4DiT W4A8", {"method": "ptq4dit", **QUANTILES, **STATIC, **LEARNED}, w4[2]),
    )
    if w8 is None:
        return four
    eight = zip(four, w8, strict=True)
    return four + tuple(
        Row(row.case.replace("W4", "W8"), {**row.recipe, "weights": "w8"}, figure, row.samples)
        for row, figure in eight
    )


FID_10K = "FID-10K (ADM evaluation suite)"
_META: dict[str, Any] = {"activations": "static", "attention": "none"}
_FOUR: dict[str, Any] = {**_META, "weights": "w4g", "symmetric": True}
_WHOLE = 8192  # a group that is lowered to all inputs of a linear
TABLES: dict[str, Table] = {
    "dit-256": Table(
        "DiT-XL/2, ImageNet 256, 50 DDPM steps, guidance 1.5", FID_10K, "6.02 to 6.71",
        50, 1.5, "ddpm", 10000, _rows(("9.05", "8.77", "9.17"), ("7.61", "6.78", "5.45 to 6.97")),
    ),
    "dit-256-100": Table(
        "DiT-XL/2, ImageNet 256, 100 DDPM steps, guidance 1.5", FID_10K, "5.00 to 5.02",
        100, 1.5, "ddpm", 10000, _rows(("6.86", "6.73", "7.75"), ("5.83", "5.14", "4.73 to 5.42")),
    ),
    "dit-512": Table(
        "DiT-XL/2, ImageNet 512, 100 DDPM steps, guidance 1.5", "FID-5K (ADM evaluation suite)", "9.06",
        100, 1.5, "ddpm", 5000, _rows(("13.45", "17.60", "19.00"), None),
    ),
    "pixart-512": Table(
        "PixArt-alpha 512, 1000 COCO captions, 50 DPM-Solver steps, guidance 3", "SQNR, dB", "",
        50, 3.0, "dpmsolver++", 1000,
        (
            Row("W8A8, all steps", {"method": "linear", **_META}, "17.78", 128),
            Row("W8A8, 1 step", {"method": "meta", **_META}, "18.65", 128),
            Row("W4A8, all steps", {"method": "linear", "group_size": _WHOLE, **_FOUR}, "4.15", 128),
            Row("W4A8, 1 step", {"method": "meta", "group_size": _WHOLE, **_FOUR}, "4.28", 128),
            Row("W4A8, 1 step, groups of 128", {"method": "meta", **_FOUR}, "12.36", 128),
        ),
        prompts=True,
    ),
}  # fmt: skip
COLUMNS = ("case", "published", "SQNR free, dB", "SQNR forced, dB", "bytes", "samples of FID")


@dataclass(frozen=True)
class Less:
    """Smaller numbers than the paper's, for a first look; None: as published.

    Attributes:
        samples: images per row.
        calibration: samples of a calibration.
        steps: of the sampler.
        iterations: of reconstruction.
    """

    samples: int | None = None
    calibration: int | None = None
    steps: int | None = None
    iterations: int | None = None


def reproduce(
    table: Table,
    pipe: Any,
    out: Path,
    prompts: str | Path | None = None,
    less: Less | None = None,
    **call: Any,
) -> Iterator[dict[str, Any]]:
    """Calibrate, convert and evaluate row by row; those that `out` holds already are read.

    Args:
        table: of TABLES.
        pipe: the float pipeline.
        out: folder: statistics, a checkpoint, a report and an .npz of samples per row.
        prompts: for a model that is conditioned on text: a text file with one per line, or embeddings.
        less: smaller numbers.
        **call: further arguments of every call of the pipeline.

    Yields:
        column -> value.

    Raises:
        ValueError: prompts are missing, or given to a model that takes classes.
    """
    if table.prompts != (prompts is not None):
        need = "needs --prompts, a file of captions" if table.prompts else "takes no --prompts"
        raise ValueError(f"papers: {table.title}: {need}")
    drawn = call if prompts is None else {"prompts": prompts, **call}
    for row in table.rows:
        done = out / f"{_stem(row.case)}.json"
        if not done.exists():
            write_json(done, _measure(table, row, pipe, out, drawn, less or Less()))
        yield json.loads(done.read_text(encoding="utf-8"))


def _measure(
    table: Table, row: Row, pipe: Any, out: Path, drawn: dict[str, Any], less: Less
) -> dict[str, Any]:
    steps, stem = less.steps or table.steps, _stem(row.case)
    count = less.calibration or row.samples
    how: dict[str, Any] = {"steps": steps, "guidance": table.guidance, "sampler": table.sampler}
    stats = calibrate(pipe, out / f"stats-{count}", samples=count, **how, **drawn)
    recipe = dict(row.recipe)
    if "iterations" in recipe:
        recipe["iterations"] = less.iterations or recipe["iterations"]
    packed = convert(pipe, Recipe(**recipe), stats, out / stem)
    settings = EvaluationSettings(
        steps, less.samples or table.samples, guidance=table.guidance, sampler=table.sampler
    )
    both = with_transformers(pipe, {"transformer": packed})
    found = evaluate(both, pipe, settings, packed_folder=out / stem, **drawn)
    if found.images is not None:
        write_npz(out / f"{stem}.npz", found.images["packed"])
    free, forced = (found.sqnr[name].mean for name in ("free", "forced"))
    npz = f"{stem}.npz" if found.images is not None else "none: the model has no VAE"
    size = open_folder(out / stem).nbytes
    return dict(zip(COLUMNS, (row.case, row.published, free, forced, size, npz), strict=True))


def _stem(case: str) -> str:
    return case.lower().replace(",", "").replace(" ", "-")
