"""Evaluate: a packed model against the float model it was made from. Reads in the order it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ditq_converters.calibrate.schedule import schedule_of
from ditq_converters.evaluate.clipping import ClipCounter
from ditq_converters.evaluate.inputs import Models, judge_pipe, transformers_of, warn_of_source
from ditq_converters.evaluate.layer_error import cascade_errors, forced_errors
from ditq_converters.evaluate.records import Evaluation, EvaluationSettings
from ditq_converters.evaluate.runs import Run, run
from ditq_converters.evaluate.scores import Judges, judge
from ditq_converters.evaluate.sqnr import compare_runs, forced_sqnr
from ditq_converters.pages.origin import versions
from ditq_converters.progress import progress_bar
from ditq_runtime.calls.inputs import Given, Input, gather
from ditq_runtime.calls.pipeline import with_transformers
from ditq_runtime.calls.schedulers import SAMPLERS
from ditq_runtime.files import check_new
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
    drawn: list[Run] | None = None,
    **call: Any,
) -> Evaluation:
    """Measure a packed model against its float model: SQNR, layers, images, distances, bytes.

    Both draw the same inputs from equal noise, through the scheduler and the VAE of `float_pipe` (of `packed_pipe`
    where the other is a transformer alone).

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
    if out is not None:
        check_new(Path(out))
    packed, models = transformers_of(packed_pipe, float_pipe)
    pipe = judge_pipe(packed_pipe, float_pipe)
    given = _given(pipe, settings, inputs, prompts, call)
    judges = Judges.load(settings.features, settings.lpips, settings.fid, pipe)
    found = _measure(packed, models, pipe, given, settings, judges, quiet, drawn)
    first, twin = (next(iter(side.values())) for side in (packed, models))
    found.figures["notes"] = warn_of_source(first, twin) + found.figures["notes"]
    found.figures["bytes"] = _sizes(models, packed_folder)
    found.figures["seconds"] = time.perf_counter() - begin
    if out is not None:
        from ditq_converters.evaluate.report import write_report  # matplotlib loads on first use

        write_report(Path(out), found)
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
    for field in ("few_samples", "micro_batch"):
        if getattr(settings, field) < 1:
            raise ValueError(
                f"evaluate: {field} must be at least 1, got {getattr(settings, field)}"
            )
    drawn = settings.samples
    if drawn is None and inputs is None and prompts is None:
        drawn = SAMPLES
    size = min(settings.micro_batch, settings.few_samples)
    return gather(
        "evaluate", pipe, inputs, prompts=prompts, samples=drawn, batch=size, steps=settings.steps,
        guidance=settings.guidance, seed=settings.seed, call=call,
    )  # fmt: skip


def _measure(
    packed: Models,
    models: Models,
    pipe: Any,
    given: list[Input],
    settings: EvaluationSettings,
    judges: Judges,
    quiet: bool,
    drawn: list[Run] | None,
) -> Evaluation:
    how, few = (given, settings.sampler or ""), settings.few_samples
    drawn = [] if drawn is None else drawn
    with progress_bar("drawing", (1 if drawn else 2) * len(given), quiet=quiet) as tick:
        if not drawn:
            drawn += [run(with_transformers(pipe, models), *how, few=few, decode=True, tick=tick)]
        ours = drawn[0]
        with ClipCounter(packed) as counter:
            theirs = run(with_transformers(pipe, packed), *how, decode=True, tick=tick)
    forwards = sum(len(calls) for calls in ours.calls)
    with progress_bar("comparing forwards", 3 * forwards, quiet=quiet) as tick:
        sqnr = {"free": compare_runs(ours, theirs), "forced": forced_sqnr(ours.calls, packed, tick)}
        layers = (
            cascade_errors(models, packed, ours.calls, tick),
            forced_errors(models, packed, ours.calls, tick),
        )
    clip = counter.names, counter.shares()
    latents, images = _sides(ours, theirs, "latents"), _sides(ours, theirs, "images")
    labels = tuple(label for one in given for label in one.arguments.get("class_labels", ()))
    first = next(iter(packed.values()))
    figures = {
        "settings": {**asdict(settings), "inputs": len(given), "steps": _steps(ours)},
        "versions": versions(),
        "architecture": type(first).__name__,
        "recipe": getattr(first.config.quantization_config, "recipe", {}),
        "labels": list(labels),
        "sqnr": {name: curve.to_dict() for name, curve in sqnr.items()},
        "layers": {errors.mode: _means(errors.names, errors.relative) for errors in layers},
        "clip_fraction": _means(*clip),
        **judge(pipe, latents, images, labels, judges),
    }
    if ours.unlike:
        left_out = f"{ours.unlike} inputs of other sizes are left out of the scores of images"
        figures["notes"].append(left_out)
    timesteps = schedule_of(
        [[one.call.timestep for one in calls] for calls in ours.calls]
    ).timesteps
    return Evaluation(figures, list(timesteps), sqnr, layers, clip, latents or {}, images)


def _sides(ours: Run, theirs: Run, field: str) -> dict[str, torch.Tensor] | None:
    """What both have, under "float" and "packed"; None if one has not."""
    found = {"float": getattr(ours, field), "packed": getattr(theirs, field)}
    return None if any(value is None for value in found.values()) else found


def _steps(ours: Run) -> int:
    return max(len(steps) for steps in ours.steps)


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
