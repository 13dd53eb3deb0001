"""Sample a class-conditional transformer in lock step: all samples take call i before any takes call i + 1.

Calibration and evaluation share this loop. Noise is counter-based, so a result depends on (seed, sample, call) alone,
not on batch split, device or the point a run was resumed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingPlan:
    """What to sample.

    Attributes:
        labels: one class id per sample.
        null_label: class id that means "no class".
        steps: model calls per sample.
        guidance: classifier-free guidance weight; at 1 or below no null half is run.
        seed: of the initial noise.
        micro_batch: samples per forward (each counts twice under guidance).

    Raises:
        ValueError: a count below one.
    """

    labels: tuple[int, ...]
    null_label: int = 1000
    steps: int = 50
    guidance: float = 1.5
    seed: int = 0
    micro_batch: int = 32

    def __post_init__(self) -> None:
        """Validate the counts."""
        for field in ("steps", "micro_batch"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"sampling: {field} must be at least 1, got {getattr(self, field)}"
                )
        if not self.labels:
            raise ValueError("sampling: at least one sample is needed, got none")

    @property
    def guided(self) -> bool:
        """Whether a null half runs beside the conditional half."""
        return self.guidance > 1


@dataclass(frozen=True)
class Call:
    """One model call of all samples.

    Attributes:
        index: 0 is the noisiest.
        timestep: of the scheduler.
        latents: [S, C, H, W] before the call.
        epsilon: [S, C, H, W] the guided prediction.
        after: [S, C, H, W] latents after the scheduler's step; of the last call, the samples.
    """

    index: int
    timestep: float
    latents: torch.Tensor
    epsilon: torch.Tensor
    after: torch.Tensor


def splitmix64(*counters: int) -> int:
    """A well-mixed 63-bit seed from counters (Steele, Lea and Flood 2014, the SplitMix64 finalizer)."""
    state = 0
    for counter in counters:
        state = (state + counter + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state >> 1


def noise_generator(seed: int, sample: int, call: int) -> torch.Generator:
    """The generator of one sample's noise before call `call`; the initial noise is call 0."""
    return torch.Generator().manual_seed(splitmix64(seed, sample, call))


def initial_latents(plan: SamplingPlan, model: Any) -> torch.Tensor:
    """[S, C, H, W] fp32 Gaussian noise."""
    size, channels = model.config.sample_size, model.config.in_channels
    return torch.stack(
        [
            torch.randn(channels, size, size, generator=noise_generator(plan.seed, sample, 0))
            for sample in range(len(plan.labels))
        ]
    )


def predict(
    model: nn.Module, latents: torch.Tensor, timestep: Any, plan: SamplingPlan
) -> torch.Tensor:
    """The guided noise prediction for all samples, in micro-batches.

    Args:
        model: DiT forward signature.
        latents: [S, C, H, W] fp32.
        timestep: scalar of the scheduler.
        plan: labels, guidance and micro-batch.

    Returns:
        [S, C, H, W] fp32; a learned variance is dropped.
    """
    parameter = next(model.parameters())
    parts = []
    training = model.training
    model.eval()  # a DiT in training mode drops labels at random
    for start in range(0, len(latents), plan.micro_batch):
        chunk = latents[start : start + plan.micro_batch].to(parameter.device, parameter.dtype)
        labels = torch.tensor(
            plan.labels[start : start + plan.micro_batch], device=parameter.device
        )
        if plan.guided:
            chunk = torch.cat([chunk, chunk])
            labels = torch.cat([labels, torch.full_like(labels, plan.null_label)])
        times = torch.as_tensor(timestep, device=parameter.device).expand(len(chunk))
        out = model(chunk, timestep=times, class_labels=labels).sample
        epsilon = out[:, : latents.shape[1]].float().cpu()
        if plan.guided:
            cond, null = epsilon.chunk(2)
            epsilon = null + plan.guidance * (cond - null)
        parts.append(epsilon)
    model.train(training)
    return torch.cat(parts)


@torch.no_grad()
def trajectory(
    model: nn.Module,
    scheduler: Any,
    plan: SamplingPlan,
    start: int = 0,
    latents: torch.Tensor | None = None,
    before_call: Callable[[int], None] | None = None,
) -> Iterator[Call]:
    """Run the sampler, yielding every call when it is done.

    Args:
        model: the transformer.
        scheduler: a single-step diffusers scheduler (DDIM, DDPM).
        plan: what to sample.
        start: first call to run; `latents` are then those before that call.
        latents: [S, C, H, W]; default: Gaussian noise.
        before_call: told the index of each call before it runs.

    Yields:
        `plan.steps - start` calls, noisiest first.
    """
    scheduler.set_timesteps(plan.steps)
    current = initial_latents(plan, model) if latents is None else latents
    for index, timestep in enumerate(scheduler.timesteps):
        if index < start:
            continue
        if before_call is not None:
            before_call(index)
        epsilon = predict(model, scheduler.scale_model_input(current, timestep), timestep, plan)
        noise = [noise_generator(plan.seed, sample, index + 1) for sample in range(len(current))]
        after = scheduler.step(epsilon, timestep, current, generator=noise).prev_sample
        yield Call(index, float(timestep), current, epsilon, after)
        current = after
