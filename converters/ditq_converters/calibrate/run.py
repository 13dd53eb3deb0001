"""Calibrate: sample the float model and record the range of every linear input, per call and channel."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ditq_converters.calibrate.conditions import choose
from ditq_converters.calibrate.hosts import host_of
from ditq_converters.calibrate.labels import class_ids, draw_labels
from ditq_converters.calibrate.memory import fitting_micro_batch
from ditq_converters.calibrate.recorder import Recorder
from ditq_converters.calibrate.rows import RowPlan, evenly_spaced
from ditq_converters.calibrate.samplers import SAMPLERS, history, make_scheduler, set_timesteps
from ditq_converters.calibrate.stats import (
    CalibrationStats,
    ResumePoint,
    StatisticsError,
    model_hash,
    read_manifest,
    read_state,
    remove_state,
    shard_path,
    write_manifest,
    write_shard,
    write_state,
)
from ditq_converters.calibrate.trajectory import SamplingPlan, trajectory
from ditq_converters.models.gate import float_transformer
from ditq_converters.progress import note, progress_bar
from ditq_runtime.families import Family, family_of
from ditq_runtime.files import remove_leftovers
from ditq_runtime.surroundings import steady

__all__ = ["SAMPLERS", "calibrate", "class_ids", "draw_labels", "make_scheduler"]

STEPS = 50
IF_ABSENT = {"attention": False}  # what a manifest means that was written before there was the key


@steady()
def calibrate(
    pipe: Any,
    out: str | Path,
    steps: int | None = None,
    samples: int = 32,
    guidance: float = 1.5,
    sampler: str | None = None,
    seed: int = 0,
    micro_batch: int = 32,
    quiet: bool = False,
    *,
    rows: int = 64,
    cfg_channels: int | None = None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | str | Path | None = None,
    memory_budget: int | None = None,
    attention: bool = True,
) -> CalibrationStats:
    """Data-free calibration: run the float model from Gaussian noise and store the ranges it meets.

    A killed run goes on where it was: call it again with the same arguments.

    Args:
        pipe: a diffusers pipeline, or its transformer alone.
        out: folder for the statistics.
        steps: model calls per sample, T; default: 50. Sampler `t_max` always makes one.
        samples: images to sample, S; their classes or prompts are drawn without replacement where there are enough.
        guidance: classifier-free guidance weight; statistics cover both halves.
        sampler: one of SAMPLERS; default: ddim, or flow for a flow-matching model.
        seed: of classes, noise and the choice of rows.
        micro_batch: samples per forward; bounds memory.
        quiet: show no progress bar.
        rows: input rows to keep per site for searches, at min(T, 50) evenly spaced calls; 0 keeps none. On disk that
            is 4 bytes (fp32) times rows times calls times all channels: 2.9 GB for DiT-XL at 64 rows and 50 calls.
        cfg_channels: leading channels that are guided; None: all, as diffusers' pipeline does; 3: as DiT's own code.
        labels: class ids, one per sample, instead of drawing `samples` of them.
        prompts: for a text-conditioned model: prompts, a text file with one per line, or a `.safetensors` file of their
            embeddings (see `captions`).
        memory_budget: bytes; lowers `micro_batch` so that the peak stays below (see `memory`). A resumed run keeps the
            micro-batch it began with.
        attention: also record the ranges of Q, K and V, which static attention scales need.

    Returns:
        The opened statistics.

    Raises:
        ValueError: an unknown sampler, class or channel count, an unsupported transformer, a count below one, a
            budget that one sample does not fit into, prompts that are missing or do not fit.
        StatisticsError: `out` holds statistics of another model or plan, or the model gave non-finite values.
    """
    model: Any = float_transformer(pipe, "calibrate")
    family = family_of(type(model).__name__)
    host = host_of(model)
    sampler = sampler or host.sampler
    scheduler = make_scheduler(pipe, sampler, model)
    calls = _number_of_calls(sampler, steps, quiet)
    _check_channels(model, cfg_channels)
    told = choose("calibrate", pipe, model, samples, seed, guidance, labels, prompts)
    plan = SamplingPlan(
        told.ids, told.null, calls, guidance, seed, micro_batch, cfg_channels, told.captions, host.distilled
    )  # fmt: skip
    kept = RowPlan(rows, evenly_spaced(calls) if rows else (), len(told.ids), plan.guided, seed)
    folder = Path(out)
    if memory_budget is not None:
        micro_batch = _fit(model, family, scheduler, plan, rows, memory_budget, folder)
        plan = replace(plan, micro_batch=micro_batch)
    manifest = _manifest(model, plan, sampler, scheduler, kept)
    manifest["memory_budget"] = memory_budget
    manifest["attention"] = attention
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, manifest)
    recorder = Recorder(model, family, kept, attention)
    _run(model, scheduler, plan, recorder, folder, quiet)
    return CalibrationStats.open(folder)


def _run(
    model: nn.Module,
    scheduler: Any,
    plan: SamplingPlan,
    recorder: Recorder,
    folder: Path,
    quiet: bool,
) -> None:
    """Make the calls that are not on disk."""
    state = read_state(folder)
    if state is None and all(shard_path(folder, call).exists() for call in range(plan.steps)):
        return
    done = state.call + 1 if state else 0
    latents, remembered = (state.latents, state.history) if state else (None, None)
    with recorder, progress_bar("calibrating", plan.steps, done, quiet) as advance:
        run = trajectory(model, scheduler, plan, done, latents, recorder.begin, remembered)
        for call in run:
            write_shard(folder, call.index, recorder.ranges(), recorder.rows())
            write_state(folder, ResumePoint(call.index, call.after, history(scheduler)))
            advance()
    remove_state(folder)


def _fit(
    model: nn.Module,
    family: Family,
    scheduler: Any,
    plan: SamplingPlan,
    rows: int,
    budget: int,
    folder: Path,
) -> int:
    """The micro-batch that an earlier run with this budget chose, so that bytes are the same; or what fits now."""
    if (folder / "manifest.json").exists():
        before = read_manifest(folder)
        if before.get("memory_budget") == budget:
            return int(before["plan"]["micro_batch"])
    set_timesteps(scheduler, plan.steps)
    return fitting_micro_batch(model, family, plan, scheduler.timesteps[0], rows, budget)


def _number_of_calls(sampler: str, steps: int | None, quiet: bool) -> int:
    if sampler != "t_max":
        return STEPS if steps is None else steps
    if steps not in (None, 1):
        note(f"calibrate: sampler t_max makes one call, at the highest noise, not {steps}", quiet)
    return 1


def _check_channels(model: Any, cfg_channels: int | None) -> None:
    channels = host_of(model).latent_shape(model)[0]
    if cfg_channels is not None and cfg_channels > channels:
        raise ValueError(
            f"calibrate: cfg_channels must be at most {channels}, the model's latent channels, got {cfg_channels}"
        )


def _manifest(
    model: nn.Module, plan: SamplingPlan, sampler: str, scheduler: Any, rows: RowPlan
) -> dict[str, Any]:
    set_timesteps(scheduler, plan.steps)
    return {
        "sampler": sampler,
        "calls": plan.steps,
        "timesteps": [float(t) for t in scheduler.timesteps],
        "plan": plan.to_dict(),
        "rows": {"count": rows.count, "calls": list(rows.calls)},
        "architecture": type(model).__name__,
        "model_hash": model_hash(model),
        "dtype": str(next(model.parameters()).dtype),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }


def _claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a new run, or check that an unfinished one is the same."""
    remove_leftovers(folder)
    if not (folder / "manifest.json").exists():
        write_manifest(folder, manifest)
        return
    before = {**IF_ABSENT, **read_manifest(folder)}
    for key, value in manifest.items():
        if before.get(key) != value:
            raise StatisticsError(
                f"{folder}: holds a calibration with another {key} ({_short(before.get(key))}, now {_short(value)}); "
                "use a new folder, or the same arguments to resume"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
