"""The samplers a calibration can run, and what a sampler must remember to be resumed.

| name        | scheduler                          | history          |
|-------------|------------------------------------|------------------|
| ddim        | diffusers DDIMScheduler            | none             |
| ddpm        | `AncestralSampler`, below          | none             |
| dpmsolver++ | diffusers DPMSolverMultistep       | model outputs    |
| flow        | diffusers FlowMatchEulerDiscrete   | none             |
| t_max       | `HighestNoise`, below: one call    | none             |
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from ditq_converters.calibrate.hosts import host_of

SAMPLERS = ("ddim", "ddpm", "dpmsolver++", "flow", "t_max")
FLOW = "FlowMatchEulerDiscreteScheduler"
HISTORY = "model_output."


@dataclass(frozen=True)
class Step:
    """A sampler's step, as diffusers' schedulers return it.

    Attributes:
        prev_sample: [S, C, H, W] latents of the next call.
    """

    prev_sample: torch.Tensor


class AncestralSampler:
    """DDPM with the variance that the model learned (Nichol and Dhariwal, arXiv:2102.09672, Eq. 15).

    What DiT, PTQ4DiT and HTG sample with. diffusers' DiT pipeline throws the learned variance away, and its DDPM
    scheduler takes t - 1000 // T for the next timestep, which is off the grid round(linspace(0, 999, T)).
    Without a learned variance the posterior variance is used (Ho et al., arXiv:2006.11239, Eq. 7).
    """

    reads_variance = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read the noise schedule of a diffusers scheduler configuration.

        Raises:
            ValueError: the model predicts something else than the noise.
        """
        stock = diffusers.DDPMScheduler.from_config(config)
        if stock.config.prediction_type != "epsilon":
            raise ValueError(
                f"ddpm: the model must predict epsilon, its scheduler says {stock.config.prediction_type}; use ddim"
            )
        self._clip = stock.config.clip_sample_range if stock.config.clip_sample else None
        self._signal = (1 - stock.betas.double()).cumprod(0)  # [1000] alpha bar
        self.timesteps = torch.empty(0, dtype=torch.int64)

    def set_timesteps(self, steps: int) -> None:
        """T = `steps` timesteps round(linspace(0, 999, T)), descending."""
        if steps > len(self._signal):
            raise ValueError(f"ddpm: steps must be at most {len(self._signal)}, got {steps}")
        grid = torch.linspace(0, len(self._signal) - 1, steps, dtype=torch.float64)
        self.timesteps = grid.round().long().flip(0)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: list[torch.Generator],
    ) -> Step:
        """Draw x[t - 1] ~ N(mean, variance); the last step adds no noise.

        Args:
            model_output: [S, C, H, W] epsilon, or [S, 2C, H, W] with the interpolation v of log variances behind it.
            timestep: on the grid.
            sample: [S, C, H, W] x[t].
            generator: one per sample.
        """
        channels = sample.shape[1]
        index = int((self.timesteps == timestep).nonzero()[0])
        last = index + 1 == len(self.timesteps)
        now = self._signal[self.timesteps[index]]
        then = torch.ones_like(now) if last else self._signal[self.timesteps[index + 1]]
        beta = 1 - now / then
        clean = (
            sample - (1 - now).sqrt().float() * model_output[:, :channels]
        ) / now.sqrt().float()
        if self._clip is not None:
            clean = clean.clamp(-self._clip, self._clip)
        from_clean = then.sqrt() * beta / (1 - now)
        from_sample = (now / then).sqrt() * (1 - then) / (1 - now)
        mean = from_clean.float() * clean + from_sample.float() * sample
        if last:
            return Step(mean)
        log_variance = (beta * (1 - then) / (1 - now)).log().float()
        if model_output.shape[1] == 2 * channels:
            fraction = (model_output[:, channels:] + 1) / 2
            log_variance = fraction * beta.log().float() + (1 - fraction) * log_variance
        noise = torch.stack([torch.randn(sample.shape[1:], generator=g) for g in generator])
        return Step(mean + (log_variance / 2).exp() * noise)


class HighestNoise:
    """One call at the highest noise and no step.

    The 1-step calibration of Yang et al., "An Analysis on Quantizing Diffusion Transformers". A grid of one step
    would not do: its only timestep is 0 with DDIM or DDPM and 500 with DPM-Solver++ (`leading`).
    """

    def __init__(self, config: Mapping[str, Any], flow: bool) -> None:
        """Timestep 999 of 1000 noise levels; 1000, where sigma is 1, for flow matching."""
        levels = config.get("num_train_timesteps", 1000)
        self._highest = torch.tensor([float(levels)]) if flow else torch.tensor([levels - 1])
        self.timesteps = self._highest

    def set_timesteps(self, steps: int) -> None:
        """The one timestep; ValueError for more."""
        if steps != 1:
            raise ValueError(f"t_max: makes one call, so steps must be 1, got {steps}")
        self.timesteps = self._highest

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, generator: Any) -> Step:
        """The latents, unchanged: nothing follows."""
        return Step(sample)


def make_scheduler(pipe: Any, sampler: str, model: Any = None) -> Any:
    """A fresh scheduler with the pipeline's noise schedule; DiT's own schedule where there is no pipeline.

    Args:
        pipe: a pipeline, or a transformer alone.
        sampler: one of SAMPLERS.
        model: the transformer, where a schedule may depend on its number of tokens.

    Raises:
        ValueError: an unknown sampler, or one that does not fit what the model was trained to predict.
    """
    if sampler not in SAMPLERS:
        raise ValueError(
            f"calibrate: sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}"
        )
    own = getattr(pipe, "scheduler", None)
    flow = _is_flow(own, sampler, model)
    clips = {"clip_sample": False} if sampler in ("ddim", "ddpm") else {}
    config = clips if own is None else own.config
    if sampler == "t_max":
        return HighestNoise(config, flow)
    if flow != (sampler == "flow"):
        fitting = "flow or t_max" if flow else "ddim, ddpm, dpmsolver++ or t_max"
        raise ValueError(
            f"calibrate: sampler {sampler} does not fit a model whose scheduler is {_name(own)}; use {fitting}"
        )
    if sampler == "ddpm":
        return AncestralSampler(config)
    if sampler == "ddim":
        return diffusers.DDIMScheduler.from_config(config)
    if (
        sampler == "dpmsolver++"
    ):  # variance_type: it would cut the model output itself, to 3 channels
        return diffusers.DPMSolverMultistepScheduler.from_config(
            config, algorithm_type="dpmsolver++", variance_type=None
        )
    fixed = _fixed_shift(config, model)
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, **fixed)


def _name(own: Any) -> str:
    return type(own).__name__ if own is not None else "not there, and is that of its class"


def _is_flow(own: Any, sampler: str, model: Any) -> bool:
    """Whether the model was trained by flow matching: its scheduler says so; without one its class, or the user."""
    if own is not None:
        return type(own).__name__ == FLOW
    return sampler == "flow" or (model is not None and host_of(model).sampler == "flow")


def _fixed_shift(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The shift that a dynamic one comes to at the calibrated image size, exp(mu), mu linear in the image tokens.

    With that shift, sigma' = shift sigma / (1 + (shift - 1) sigma) is the exponential time shift itself
    (arXiv:2403.03206, Eq. 23).
    """
    if not config.get("use_dynamic_shifting", False):
        return {}
    if model is None or config.get("time_shift_type", "exponential") != "exponential":
        raise ValueError(
            "calibrate: sampler flow supports use_dynamic_shifting only with the exponential shift of a known model; "
            "use t_max, or fix `shift` in the scheduler"
        )
    _, height, width = host_of(model).latent_shape(model)
    tokens = height * width / 4  # patches of 2 x 2
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    mu = config["base_shift"] + slope * (tokens - low)
    return {"use_dynamic_shifting": False, "shift": math.exp(mu)}


def history(scheduler: Any) -> dict[str, torch.Tensor]:
    """What a multistep scheduler remembers between calls: name -> [S, C, H, W]; empty for the others."""
    outputs = getattr(scheduler, "model_outputs", [])
    return {f"{HISTORY}{i}": output for i, output in enumerate(outputs) if output is not None}


def set_timesteps(scheduler: Any, steps: int) -> None:
    """Begin a run of `steps` calls."""
    with (
        warnings.catch_warnings()
    ):  # TODO: drop when diffusers' DPM-Solver no longer copies a tensor by np.array
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        scheduler.set_timesteps(steps)


def restore(scheduler: Any, call: int, remembered: Mapping[str, torch.Tensor]) -> None:
    """Put a scheduler, its timesteps set, where it was before call `call`.

    Raises:
        ValueError: a multistep scheduler is to go on without its history.
    """
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(call)
    if not hasattr(scheduler, "model_outputs"):
        return
    order = len(scheduler.model_outputs)
    wanted = {f"{HISTORY}{i}" for i in range(max(0, order - call), order)}
    if wanted != set(remembered):
        raise ValueError(
            f"resume at call {call}: needs the last {len(wanted)} model outputs, got {sorted(remembered)}"
        )
    for i in range(order):
        scheduler.model_outputs[i] = remembered.get(f"{HISTORY}{i}")
    scheduler.lower_order_nums = min(call, order)
