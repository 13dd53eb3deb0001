"""Evaluate: a packed model against the float model it was made from. Reads in the order it runs."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ditq_converters.calibrate.conditions import choose
from ditq_converters.calibrate.hosts import host_of
from ditq_converters.calibrate.run import make_scheduler
from ditq_converters.calibrate.trajectory import Call, SamplingPlan
from ditq_converters.evaluate.clipping import ClipCounter
from ditq_converters.evaluate.inputs import judge_pipe, transformers_of, warn_of_source
from ditq_converters.evaluate.layer_error import cascade_errors, forced_errors
from ditq_converters.evaluate.records import SAMPLERS, Evaluation, EvaluationSettings
from ditq_converters.evaluate.scores import Judges, decode, judge
from ditq_converters.evaluate.sqnr import (
    compare_runs,
    forced_sqnr,
    halves_sqnr,
    run,
    subset,
)
from ditq_converters.progress import progress_bar
from ditq_runtime.files import check_new
from ditq_runtime.format.folder import open_folder
from ditq_runtime.host.sizes import size_by_category
from ditq_runtime.surroundings import steady


@steady()
def evaluate(
    packed_pipe: Any,
    float_pipe: Any,
    settings: EvaluationSettings | None = None,
    out: str | Path | None = None,
    packed_folder: str | Path | None = None,
    quiet: bool = False,
    prompts: Sequence[str] | str | Path | None = None,
) -> Evaluation:
    """Measure a packed model against its float model: SQNR, layers, images, distances, bytes.

    Both sample from equal noise with equal classes or prompts, through the scheduler and the VAE of `float_pipe` (of
    `packed_pipe` where the other is a transformer alone).

    Args:
        packed_pipe: a packed pipeline, or its transformer alone.
        float_pipe: the float pipeline it was made from, or its transformer alone.
        settings: how much of everything; default: EvaluationSettings().
        out: folder for the report; must not exist, or be empty; default: write none.
        packed_folder: where the packed model lies, for its true bytes; default: leave them out.
        quiet: show no progress bar.
        prompts: for a text-conditioned model, as for `calibrate`: prompts, a text file, or a `.safetensors` file of
            their embeddings.

    Returns:
        All figures, curves, samples and images.

    Raises:
        ValueError: the models are no twins, a count is below one, an unknown sampler, halves without guidance,
            prompts that are missing or do not fit.
        FileExistsError: `out` is in use.
        ImportError: LPIPS or FID was asked for and its package is missing.
    """
    settings = settings or EvaluationSettings()
    begin = time.perf_counter()
    if out is not None:
        check_new(Path(out))
    packed, model = transformers_of(packed_pipe, float_pipe)
    pipe = judge_pipe(packed_pipe, float_pipe)
    settings = replace(settings, sampler=settings.sampler or host_of(model).sampler)
    plan = _plan(pipe, model, settings, prompts)
    judges = Judges.load(settings.features, settings.lpips, settings.fid, pipe)
    with progress_bar("evaluating", _calls(settings), quiet=quiet) as advance:
        found = _measure(packed, model, pipe, plan, settings, judges, advance)
    found.figures["notes"] = warn_of_source(packed, model) + found.figures["notes"]
    found.figures["bytes"] = _sizes(model, packed_folder)
    found.figures["seconds"] = time.perf_counter() - begin
    if out is not None:
        from ditq_converters.evaluate.report import write_report  # matplotlib loads on first use

        write_report(Path(out), found)
    return found


def _plan(
    pipe: Any,
    model: Any,
    settings: EvaluationSettings,
    prompts: Sequence[str] | str | Path | None,
) -> SamplingPlan:
    if settings.sampler not in SAMPLERS:
        raise ValueError(
            f"evaluate: sampler must be one of {', '.join(SAMPLERS)}, got {settings.sampler!r}"
        )
    if settings.few_samples < 1:
        raise ValueError(f"evaluate: few_samples must be at least 1, got {settings.few_samples}")
    how = settings.samples, settings.seed, settings.guidance
    told = choose("evaluate", pipe, model, *how, prompts=prompts)
    plan = SamplingPlan(
        told.ids,
        told.null,
        settings.steps,
        settings.guidance,
        settings.seed,
        settings.micro_batch,
        captions=told.captions,
        distilled=host_of(model).distilled,
    )
    if settings.halves and not plan.guided:
        why = "this model is told its guidance" if plan.distilled else f"got {settings.guidance}"
        raise ValueError(f"evaluate: halves need guidance above 1 in two forwards, and {why}")
    return plan


def _calls(settings: EvaluationSettings) -> int:
    """Ticks of the progress bar: two runs, forced, cascade, forced blocks, and two halves where asked for."""
    return settings.steps * (7 if settings.halves else 5)


def _measure(
    packed: Any,
    model: Any,
    pipe: Any,
    plan: SamplingPlan,
    settings: EvaluationSettings,
    judges: Judges,
    advance: Callable[[], None],
) -> Evaluation:
    schedulers = [make_scheduler(pipe, str(settings.sampler), model) for _ in range(2)]
    ours = run(model, schedulers[0], plan, advance)
    theirs, clip = _clipped_run(packed, schedulers[1], plan, advance)
    count = settings.few_samples
    few, few_plan = subset(ours, count), replace(plan, labels=plan.labels[:count])
    sqnr = {
        "free": compare_runs(ours, theirs),
        "forced": forced_sqnr(few, packed, few_plan, advance),
    }
    layers = (
        cascade_errors(model, packed, few, few_plan, advance),
        forced_errors(model, packed, few, few_plan, advance),
    )
    if settings.halves:
        both = halves_sqnr(model, packed, few, subset(theirs, count), few_plan, advance)
        sqnr |= {
            f"{half} {kind}": curve for half, kinds in both.items() for kind, curve in kinds.items()
        }
    latents = {"float": ours[-1].after, "packed": theirs[-1].after}
    images = decode(pipe, latents, plan.micro_batch)
    figures = {
        "settings": asdict(settings),
        "versions": _versions(),
        "architecture": type(model).__name__,
        "recipe": getattr(packed.config.quantization_config, "recipe", {}),
        "labels": list(plan.labels),
        "sqnr": {name: curve.to_dict() for name, curve in sqnr.items()},
        "layers": {errors.mode: _means(errors.names, errors.relative) for errors in layers},
        "clip_fraction": _means(*clip),
        **judge(pipe, latents, images, plan.labels, judges),
    }
    timesteps = [call.timestep for call in ours]
    return Evaluation(figures, timesteps, sqnr, layers, clip, latents, images)


def _clipped_run(
    packed: Any, scheduler: Any, plan: SamplingPlan, advance: Callable[[], None]
) -> tuple[list[Call], tuple[list[str], torch.Tensor]]:
    """The packed model's own run, and what its static ranges cut off on the way."""
    shares = []
    with ClipCounter(packed) as counter:

        def after_call() -> None:
            shares.append(counter.take())
            advance()

        calls = run(packed, scheduler, plan, after_call)
    return calls, (counter.names, torch.stack(shares, dim=1))


def _means(names: list[str], values: torch.Tensor) -> dict[str, float]:
    """Name -> mean over calls of [names, calls]."""
    return dict(zip(names, values.mean(1).tolist(), strict=True))


def _sizes(model: Any, packed_folder: str | Path | None) -> dict[str, Any]:
    """True bytes on disk of the packed transformer, and of the float one's parameters in its dtype."""
    memory = sum(p.numel() * p.element_size() for p in model.parameters())
    sizes: dict[str, Any] = {"float_in_memory": memory, "packed": None, "packed_total": None}
    if packed_folder is not None:
        folder = open_folder(packed_folder)
        sizes |= {"packed": size_by_category(folder), "packed_total": folder.nbytes}
    return sizes


def _versions() -> dict[str, str]:
    import diffusers

    from ditq_converters.convert.story import ditq_version

    return {
        "ditq": ditq_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
