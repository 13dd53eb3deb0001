"""Evaluate: a packed model against the float model it was made from. Reads in the order it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ditq_converters.calibrate.schedule import schedule_of
from ditq_converters.evaluate.clipping import shares
from ditq_converters.evaluate.inputs import Models, judge_pipe, transformers_of, warn_of_source
from ditq_converters.evaluate.layer_error import CASCADE, FORCED, gathered
from ditq_converters.evaluate.parts import (
    CLIP,
    FREE,
    IMAGES,
    LATENTS,
    REPLAYED,
    SIDES,
    Part,
    Task,
    check_out,
    parts_of,
    write_once,
)
from ditq_converters.evaluate.records import Evaluation, EvaluationSettings
from ditq_converters.evaluate.runs import Run
from ditq_converters.evaluate.scores import Judges, judge
from ditq_converters.evaluate.sqnr import curve
from ditq_converters.pages.origin import versions
from ditq_converters.progress import progress_bar
from ditq_runtime.calls.input_checks import check_positive
from ditq_runtime.calls.inputs import Given, Input, gather
from ditq_runtime.calls.schedulers import SAMPLERS
from ditq_runtime.format.folder import transformer_folders
from ditq_runtime.host.sizes import add_up, size_by_category, size_in_memory
from ditq_runtime.surroundings import steady

SAMPLES = 50


@steady()
def evaluate(
    packed_pipe: Any,
    float_pipe: Any,
    settings: EvaluationSettings | None = None,
    out: str | Path | None = None,
    packed_folder: str | Path | None = None,
    quiet: bool = False,
    inputs: Given | None = None,
    prompts: Sequence[str] | str | Path | None = None,
    drawn: dict[int, Run] | None = None,
    **call: Any,
) -> Evaluation:
    """Measure a packed model against its float model: SQNR, layers, images, distances, bytes.

    Both draw the same inputs from equal noise, through the scheduler and the VAE of `float_pipe` (of `packed_pipe`
    where the other is a transformer alone). With an `out`, what an input showed stays in the hidden folder
    `.OUT.inputs` until the report is there: a killed run goes on after the last finished input, and processes that
    torchrun or accelerate started share the inputs; the figures are those of one process.

    Args:
        packed_pipe: a packed pipeline, or its transformer alone.
        float_pipe: the float pipeline it was made from, or its transformer alone.
        settings: how much of everything; default: EvaluationSettings().
        out: folder for the report; must not exist, or be empty; default: write none.
        packed_folder: where the packed model lies, for its true bytes; default: leave them out.
        quiet: show no progress bar.
        inputs: as for `calibrate`: one entry of arguments per call, or a file of them.
        prompts: as for `calibrate`: prompts, a text file, or a `.safetensors` file of their embeddings.
        drawn: what the float model drew: empty, to be filled for the next packed model; else taken as it is.
        **call: further arguments of every call.

    Returns:
        All figures, curves, samples and images.

    Raises:
        ValueError: the models are no twins, a count is below one, an unknown sampler, inputs that are missing or do
            not fit.
        FileExistsError: `out` is in use.
        ImportError: LPIPS or FID was asked for and its package is missing.
    """
    settings = settings or EvaluationSettings()
    begin = time.perf_counter()
    target = None if out is None else Path(out)
    if target is not None:
        check_out(target)
    packed, models = transformers_of(packed_pipe, float_pipe)
    pipe = judge_pipe(packed_pipe, float_pipe)
    given = _given(pipe, settings, inputs, prompts, call)
    judges = Judges.load(settings.features, settings.lpips, settings.fid, pipe)
    with progress_bar("drawing and comparing", len(given), quiet=quiet) as tick:
        task = Task(packed, models, pipe, given, settings, tick, drawn)
        parts = parts_of(task, target)
    found = _gather_up(task, parts, judges)
    first, twin = (next(iter(side.values())) for side in (packed, models))
    found.figures["notes"] = warn_of_source(first, twin) + found.figures["notes"]
    found.figures["bytes"] = _sizes(models, packed_folder)
    found.figures["seconds"] = time.perf_counter() - begin
    if target is not None:
        from ditq_converters.evaluate.report import write_report  # matplotlib loads on first use

        write_once(target, lambda: write_report(target, found))
    return found


def _given(
    pipe: Any,
    settings: EvaluationSettings,
    inputs: Given | None,
    prompts: Sequence[str] | str | Path | None,
    call: dict[str, Any],
) -> list[Input]:
    if settings.sampler is not None and settings.sampler not in SAMPLERS:
        raise ValueError(
            f"evaluate: sampler must be one of {', '.join(SAMPLERS)}, got {settings.sampler!r}"
        )
    few, size = settings.few_samples, settings.micro_batch
    check_positive("evaluate", few_samples=few, micro_batch=size)
    drawn = settings.samples
    if drawn is None and inputs is None and prompts is None:
        drawn = SAMPLES
    return gather(
        "evaluate", pipe, inputs, prompts=prompts, samples=drawn, batch=min(size, few), steps=settings.steps,
        guidance=settings.guidance, seed=settings.seed, call=call,
    )  # fmt: skip


def _gather_up(task: Task, parts: list[Part], judges: Judges) -> Evaluation:
    """The figures of all parts."""
    compared = [part for part in parts if REPLAYED in part.series]
    sqnr = {
        name: curve([part.series[name] for part in parts if name in part.series])
        for name in (FREE, REPLAYED)
    }
    layers = tuple(
        gathered(mode, compared[0].names[mode], [part.series[mode] for part in compared])
        for mode in (CASCADE, FORCED)
    )
    names = parts[0].names[CLIP]
    counted = [(t, found[0]) for part in parts for t, found in part.series[CLIP]]
    clip = names, shares(counted, len(names))
    latents, images, unlike = _sets(parts)
    labels = tuple(label for one in task.given for label in one.arguments.get("class_labels", ()))
    first = next(iter(task.packed.values()))
    steps = max(len(part.series[FREE]) for part in parts)
    figures = {
        "settings": {**asdict(task.settings), "inputs": len(parts), "steps": steps},
        "versions": versions(),
        "architecture": type(first).__name__,
        "recipe": getattr(first.config.quantization_config, "recipe", {}),
        "labels": list(labels),
        "sqnr": {name: found.to_dict() for name, found in sqnr.items()},
        "layers": {errors.mode: _means(errors.names, errors.relative) for errors in layers},
        "clip_fraction": _means(*clip),
        **judge(task.pipe, latents, images, labels, judges),
    }
    if unlike:
        figures["notes"].append(
            f"{unlike} inputs of other sizes are left out of the scores of images"
        )
    timesteps = schedule_of([[t for t, _ in part.series[REPLAYED]] for part in compared]).timesteps
    cascade, forced = layers
    return Evaluation(
        figures, list(timesteps), sqnr, (cascade, forced), clip, latents or {}, images
    )


def _sets(
    parts: list[Part],
) -> tuple[dict[str, torch.Tensor] | None, dict[str, torch.Tensor] | None, int]:
    """Latents and images of all inputs that have the first one's size, and how many have not."""

    def size(part: Part) -> Any:
        found = part.drawn.get(f"{LATENTS}.{SIDES[0]}")
        return None if found is None else found.shape[1:]

    alike = [part for part in parts if size(part) == size(parts[0])]
    sets = [
        {side: torch.cat([part.drawn[f"{what}.{side}"] for part in alike]) for side in SIDES}
        if all(f"{what}.{side}" in part.drawn for part in alike for side in SIDES)
        else None
        for what in (LATENTS, IMAGES)
    ]
    return sets[0], sets[1], len(parts) - len(alike)


def _means(names: list[str], values: torch.Tensor) -> dict[str, float]:
    """Name -> mean over timesteps of [names, T]."""
    return dict(zip(names, values.nanmean(1).tolist(), strict=True))


def _sizes(models: Models, packed_folder: str | Path | None) -> dict[str, Any]:
    """True bytes on disk of the packed transformer, and of the float one's parameters in its dtype."""
    memory = sum(p.numel() * p.element_size() for m in models.values() for p in m.parameters())
    sizes: dict[str, Any] = dict.fromkeys(("float", "packed", "packed_total"))
    sizes["float_in_memory"] = memory
    if packed_folder is not None:
        found = transformer_folders(packed_folder)
        folders = {name: f for name, f in found.items() if f.scheme is not None}
        sizes["packed"] = add_up(size_by_category(folder) for folder in folders.values())
        sizes["packed_total"] = sum(folder.nbytes for folder in folders.values())
        twins = ((models[name], folder.scheme) for name, folder in folders.items())
        sizes["float"] = add_up(size_in_memory(*twin) for twin in twins)
    return sizes
