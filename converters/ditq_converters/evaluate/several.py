"""Several packed models against one float model: a report each, and a page that holds them side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from ditq_converters.evaluate import plots
from ditq_converters.evaluate.evaluation import evaluate
from ditq_converters.evaluate.page import calls_of, recipe_of, summary
from ditq_converters.evaluate.records import Evaluation, EvaluationSettings
from ditq_converters.evaluate.report import write_files, write_grid
from ditq_converters.evaluate.runs import Run
from ditq_converters.pages.origin import origin
from ditq_converters.pages.template import (
    Heading,
    neighbours,
    note,
    picture,
    side_by_side,
    table,
    write_page,
)
from ditq_runtime.files import atomic_folder, check_new, write_json

MODES = {"free": "Each model on its own trajectory", "forced": "All on the float model's calls"}


def evaluate_each(
    packed: Mapping[str, str],
    open_one: Callable[[str], Any],
    float_pipe: Any,
    settings: EvaluationSettings | None = None,
    out: str | Path | None = None,
    **given: Any,
) -> dict[str, Evaluation]:
    """Measure packed models one after the other; the float model draws once.

    Args:
        packed: name -> folder. A name is a folder of the report.
        open_one: opens a folder, as late as possible: one packed model is in memory at a time.
        float_pipe: the float pipeline that all were made from.
        settings: how much of everything.
        out: folder for the page; must not exist, or be empty. Each model's own report is a folder inside.
        **given: as for `evaluate`.

    Raises:
        ValueError: as `evaluate`.
        FileExistsError: `out` is in use.
    """
    if out is not None:
        check_new(Path(out))
    drawn: dict[int, Run] = {}
    found = {
        name: evaluate(
            open_one(path), float_pipe, settings, packed_folder=path, drawn=drawn, **given
        )
        for name, path in packed.items()
    }
    if out is not None:
        with atomic_folder(Path(out)) as part:
            _write(part, found, neighbours(Path(out)))
    return found


def names_of(folders: list[str]) -> dict[str, str]:
    """Name -> folder: the last part of its path, or the part before it where all end alike, or as many as tell apart.

    Raises:
        ValueError: one folder stands there twice.
    """
    parts = [_parts(folder) for folder in folders]
    twice = [folder for folder, its in zip(folders, parts, strict=True) if parts.count(its) > 1]
    if twice:
        raise ValueError(f"{twice[0]}: stands there twice; give each packed folder once")
    while len({its[-1] for its in parts}) == 1 and all(len(its) > 1 for its in parts):
        parts = [its[:-1] for its in parts]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(its[-count:]) for its in parts]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders, strict=True))


def _parts(folder: str) -> tuple[str, ...]:
    """Of a path, from the root where it is there; of a hub id."""
    path = Path(folder)
    return tuple(part for part in (path.resolve() if path.exists() else path).parts if part != "/")


def compared(found: Mapping[str, Evaluation]) -> list[list[str]]:
    """Measure and its value for each model, one row a measure that any of them has."""
    sides = [dict(summary(one.figures)) for one in found.values()]
    measures = dict.fromkeys(what for side in sides for what in side)
    return [[what, *(side.get(what, "-") for side in sides)] for what in measures]


def _write(part: Path, found: Mapping[str, Evaluation], links: Mapping[str, str]) -> None:
    for name, one in found.items():
        (part / name).mkdir()
        write_files(part / name, one, {"all side by side": "../index.html"})
    figures = {name: one.figures for name, one in found.items()}
    write_json(part / "report.json", figures)
    for mode, title in MODES.items():
        curves = {name: one.sqnr[mode].mean_of_ratios for name, one in found.items()}
        plots.sqnr_curves(part / f"sqnr-{mode}.png", curves, f"{title}: mean of ratios")
    sizes = {name: one["bytes"]["packed"] for name, one in figures.items()}
    first = next(iter(figures.values()))
    bars = {"float": first["bytes"]["float"], **sizes}
    plots.stacked_sizes(
        part / "sizes.png", bars, "the transformer: float in memory, packed on disk"
    )
    parts = [
        *map(note, _notes(figures)),
        table(["measure", *found], [[escape(cell) for cell in row] for row in compared(found)]),
        *_samples(part, found),
        "<h2>Signal to quantization noise, per sampling step</h2>",
        side_by_side([picture(f"sqnr-{mode}.png", title) for mode, title in MODES.items()]),
        "<h2>Size</h2>",
        picture("sizes.png", "Bytes: the float model in memory, the packed ones on disk"),
    ]
    facts = {
        **{name: recipe_of(one) for name, one in figures.items()},
        "calls": calls_of(first["settings"]),
        "made with": origin(first["versions"], sum(one["seconds"] for one in figures.values())),
    }
    title = f"{first['architecture']}, {len(found)} checkpoints against their float model"
    pages = {f"{name} alone": f"{name}/index.html" for name in found}
    write_page(
        part, Heading("ditq eval", title, facts=facts), parts, ["report.json"], pages | dict(links)
    )


def _notes(figures: Mapping[str, dict[str, Any]]) -> list[str]:
    """What is noted, each once; of whom, where it is not of all."""
    noted = dict.fromkeys(text for one in figures.values() for text in one["notes"])
    found = []
    for text in noted:
        of = [name for name, one in figures.items() if text in one["notes"]]
        found.append(text if len(of) == len(figures) else f"{', '.join(of)}: {text}")
    return found


def _samples(part: Path, found: Mapping[str, Evaluation]) -> list[str]:
    """The float model's images and each packed one's, written and shown; nothing without a VAE."""
    images = {name: one.images for name, one in found.items()}
    first = next(iter(images.values()))
    if first is None:
        return []
    write_grid(part / "samples-float.png", first["float"])
    shown = [picture("samples-float.png", "float")]
    shown += [
        picture(f"{name}/samples-packed.png", name)
        for name, both in images.items()
        if both is not None
    ]
    return ["<h2>Samples, equal seeds</h2>", side_by_side(shown, "samples")]
