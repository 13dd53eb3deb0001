"""Calibrate: sample the float model and record the range of every linear input, per call and channel (METHODS 9)."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ditq_converters.models import transformer_of
from ditq_converters.progress import progress_bar
from ditq_converters.stats import (
    CalibrationStats,
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
from ditq_converters.trajectory import SamplingPlan, noise_generator, trajectory
from ditq_runtime.families import Family, family_of

SAMPLERS = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}
CLASSES = 1000


def calibrate(
    pipe: Any,
    out: str | Path,
    steps: int = 50,
    samples: int = 32,
    guidance: float = 1.5,
    sampler: str = "ddim",
    seed: int = 0,
    micro_batch: int = 32,
    quiet: bool = False,
) -> CalibrationStats:
    """Data-free calibration: run the float model from Gaussian noise and store the ranges it meets.

    A killed run goes on where it was: call it again with the same arguments.

    Args:
        pipe: a diffusers pipeline, or its transformer alone.
        out: folder for the statistics.
        steps: model calls per sample, T.
        samples: images to sample, S; their classes are drawn without replacement where there are enough.
        guidance: classifier-free guidance weight; statistics cover both halves.
        sampler: a key of SAMPLERS.
        seed: of classes and noise.
        micro_batch: samples per forward; bounds memory.
        quiet: show no progress bar.

    Returns:
        The opened statistics.

    Raises:
        ValueError: an unknown sampler, an unsupported transformer, a count below one.
        StatisticsError: `out` holds statistics of another model or plan, or the model gave non-finite values.
    """
    model: Any = transformer_of(pipe)
    family = family_of(type(model).__name__)
    labels = draw_labels(class_ids(pipe, model), samples, seed)
    plan = SamplingPlan(
        labels, model.config.num_embeds_ada_norm, steps, guidance, seed, micro_batch
    )
    scheduler = make_scheduler(pipe, sampler)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, _manifest(model, plan, sampler, scheduler))

    state = read_state(folder)
    done, latents = (state[0] + 1, state[1]) if state else (0, None)
    if state is None and all(shard_path(folder, call).exists() for call in range(steps)):
        return CalibrationStats.open(folder)
    recorder = RangeRecorder(model, family)
    with recorder, progress_bar("calibrating", steps, done, quiet) as advance:
        for call in trajectory(model, scheduler, plan, done, latents, lambda _: recorder.reset()):
            write_shard(folder, call.index, recorder.ranges())
            write_state(folder, call.index, call.after)
            advance()
    remove_state(folder)
    return CalibrationStats.open(folder)


def class_ids(pipe: Any, model: Any) -> list[int]:
    """Class ids that mean something: those the pipeline has names for, else all that the embedding has."""
    named = sorted(set(getattr(pipe, "labels", {}).values()))
    return named or list(range(min(CLASSES, model.config.num_embeds_ada_norm)))


def draw_labels(ids: list[int], samples: int, seed: int) -> tuple[int, ...]:
    """`samples` class ids, without replacement until all have been drawn (METHODS 9)."""
    if samples < 1:
        raise ValueError(f"calibrate: samples must be at least 1, got {samples}")
    drawn: list[int] = []
    generator = noise_generator(seed, 0, -1)
    while len(drawn) < samples:
        drawn += [ids[i] for i in torch.randperm(len(ids), generator=generator).tolist()]
    return tuple(drawn[:samples])


def make_scheduler(pipe: Any, sampler: str) -> Any:
    """A fresh scheduler with the pipeline's noise schedule; DiT's own schedule where there is no pipeline."""
    if sampler not in SAMPLERS:
        raise ValueError(
            f"calibrate: sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}"
        )
    own = getattr(pipe, "scheduler", None)
    config = own.config if own is not None else {"clip_sample": False}
    return SAMPLERS[sampler].from_config(config)


class RangeRecorder:
    """Forward pre-hooks that keep a running minimum and maximum of every site, per channel."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        """Remember where to listen; nothing is hooked before `with`."""
        self._ranges: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._listen = {
            f"{block}.{site.name}": model.get_submodule(f"{block}.{site.consumers[0]}")
            for block in family.block_names(model)
            for site in family.sites
        }
        self._hooks: list[Any] = []

    def __enter__(self) -> RangeRecorder:
        """Install the hooks."""
        for site, module in self._listen.items():
            self._hooks.append(module.register_forward_pre_hook(self._observer(site)))
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def reset(self) -> None:
        """Forget the last call."""
        self._ranges.clear()

    def ranges(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Site -> (min [K], max [K]) fp32 on the CPU, over everything since the last reset."""
        return {site: (low.cpu(), high.cpu()) for site, (low, high) in self._ranges.items()}

    def _observer(self, site: str) -> Any:
        def observe(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            low, high = rows.amin(0), rows.amax(0)
            if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
                raise StatisticsError(
                    f"{site}: the float model produced a value that is not finite; check its weights"
                )
            if site in self._ranges:
                before = self._ranges[site]
                low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
            self._ranges[site] = (low, high)

        return observe


def _manifest(model: nn.Module, plan: SamplingPlan, sampler: str, scheduler: Any) -> dict[str, Any]:
    scheduler.set_timesteps(plan.steps)
    return {
        "calls": plan.steps,
        "timesteps": [float(t) for t in scheduler.timesteps],
        "plan": {**asdict(plan), "labels": list(plan.labels)},
        "sampler": sampler,
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
    for leftover in folder.glob(".*.part"):  # of a killed run
        leftover.unlink()
    if not (folder / "manifest.json").exists():
        write_manifest(folder, manifest)
        return
    before = read_manifest(folder)
    for key, value in manifest.items():
        if before.get(key) != value:
            raise StatisticsError(
                f"{folder}: holds a calibration with another {key} ({_short(before.get(key))}, now {_short(value)}); "
                "use a new folder, or the same arguments to resume"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
