"""Sample a conditioned transformer in lock step: all samples take call i before any takes call i + 1.

Calibration and evaluation share this loop. Noise is counter-based, so a result depends on (seed, sample, call) alone,
not on batch split, device or the point a run was resumed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.captions import Captions
from ditq_converters.calibrate.hosts import Batch, host_of
from ditq_converters.calibrate.samplers import restore, set_timesteps

MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingPlan:
    """What to sample.

    Attributes:
        labels: one class id per sample, or one row of `captions`.
        null_label: class id that means "no class", or the row of the empty prompt.
        steps: model calls per sample.
        guidance: classifier-free guidance weight; at 1 or below no null half is run.
        seed: of the initial noise.
        micro_batch: samples per forward (each counts twice under guidance).
        cfg_channels: leading channels of the noise that are guided, the others keep the conditional prediction; None
            guides all, as diffusers' pipeline does, 3 is DiT's reference code.
        captions: prompts of a text-conditioned model.
        distilled: the model is told the guidance weight, so no null half is run.

    Raises:
        ValueError: a count below one.
    """

    labels: tuple[int, ...]
    null_label: int = 1000
    steps: int = 50
    guidance: float = 1.5
    seed: int = 0
    micro_batch: int = 32
    cfg_channels: int | None = None
    captions: Captions | None = None
    distilled: bool = False

    def __post_init__(self) -> None:
        """Validate the counts."""
        for field in ("steps", "micro_batch", "cfg_channels"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"sampling: {field} must be at least 1, got {value}")
        if not self.labels:
            raise ValueError("sampling: at least one sample is needed, got none")

    @property
    def guided(self) -> bool:
        """Whether a null half runs beside the conditional half."""
        return self.guidance > 1 and not self.distilled

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; captions by their digest, and only where there are any."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)[:-2]}
        if self.captions is not None:
            plain |= {"captions": self.captions.digest, "distilled": self.distilled}
        return {**plain, "labels": list(self.labels)}


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
    shape = host_of(model).latent_shape(model)
    return torch.stack(
        [
            torch.randn(shape, generator=noise_generator(plan.seed, sample, 0))
            for sample in range(len(plan.labels))
        ]
    )


def predict(
    model: nn.Module, latents: torch.Tensor, timestep: Any, plan: SamplingPlan
) -> torch.Tensor:
    """The guided noise prediction for all samples, in micro-batches.

    Args:
        model: of a class that `hosts` knows.
        latents: [S, C, H, W] fp32.
        timestep: scalar of the scheduler.
        plan: labels, guidance and micro-batch.

    Returns:
        [S, C, H, W] fp32; a learned variance is dropped.
    """
    return predict_all_channels(model, latents, timestep, plan)[:, : latents.shape[1]]


def predict_all_channels(
    model: nn.Module, latents: torch.Tensor, timestep: Any, plan: SamplingPlan
) -> torch.Tensor:
    """As `predict`, with a learned variance behind the noise: [S, 2C, H, W] fp32 where the model has one.

    The variance is that of the conditional half, as in DiT's `forward_with_cfg`.
    """
    parts = []
    training = model.training
    model.eval()  # a DiT in training mode drops labels at random
    try:
        for start in range(0, len(latents), plan.micro_batch):
            stop = min(start + plan.micro_batch, len(latents))
            labels = plan.labels[start:stop]
            out = _forward(model, latents[start:stop], timestep, labels, plan)
            parts.append(_guide(out, latents.shape[1], plan) if plan.guided else out)
    finally:
        model.train(training)
    return torch.cat(parts)


def _forward(
    model: Any, latents: torch.Tensor, timestep: Any, labels: tuple[int, ...], plan: SamplingPlan
) -> torch.Tensor:
    """One batch, [cond; null] under guidance; fp32 on the CPU."""
    parameter = next(model.parameters())
    chunk = latents.to(parameter.device, parameter.dtype)
    ids = torch.tensor(labels)
    if plan.guided:
        chunk = torch.cat([chunk, chunk])
        ids = torch.cat([ids, torch.full_like(ids, plan.null_label)])
    times = torch.as_tensor(timestep, device=parameter.device).expand(len(chunk))
    batch = Batch(chunk, times, ids, plan.captions, plan.guidance)
    return host_of(model).call(model, batch).float().cpu()


def _guide(out: torch.Tensor, channels: int, plan: SamplingPlan) -> torch.Tensor:
    """Null + guidance * (cond - null) in the guided channels, the conditional half in all others."""
    cond, null = out.chunk(2)
    last = min(plan.cfg_channels or channels, channels)
    guided = null[:, :last] + plan.guidance * (cond[:, :last] - null[:, :last])
    return torch.cat([guided, cond[:, last:]], dim=1)


@torch.no_grad()
def trajectory(
    model: nn.Module,
    scheduler: Any,
    plan: SamplingPlan,
    start: int = 0,
    latents: torch.Tensor | None = None,
    before_call: Callable[[int], None] | None = None,
    remembered: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[Call]:
    """Run the sampler, yielding every call when it is done.

    Args:
        model: the transformer.
        scheduler: of `samplers.make_scheduler`, or a single-step diffusers scheduler that scales no model input.
        plan: what to sample.
        start: first call to run; `latents` are then those before that call.
        latents: [S, C, H, W]; default: Gaussian noise.
        before_call: told the index of each call before it runs.
        remembered: `samplers.history` of the scheduler before call `start`.

    Yields:
        `plan.steps - start` calls, noisiest first.
    """
    set_timesteps(scheduler, plan.steps)
    restore(scheduler, start, remembered or {})
    reads_variance = getattr(scheduler, "reads_variance", False)
    current = initial_latents(plan, model) if latents is None else latents
    for index, timestep in enumerate(scheduler.timesteps):
        if index < start:
            continue
        if before_call is not None:
            before_call(index)
        output = predict_all_channels(model, current, timestep, plan)
        epsilon = output[:, : current.shape[1]]
        noise = [noise_generator(plan.seed, sample, index + 1) for sample in range(len(current))]
        prediction = output if reads_variance else epsilon
        after = scheduler.step(prediction, timestep, current, generator=noise).prev_sample
        yield Call(index, float(timestep), current, epsilon, after)
        current = after
