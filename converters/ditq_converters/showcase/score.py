"""Judge samples: against the float model's, and by the digit classifier."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ditq_converters.calibrate.trajectory import Call, SamplingPlan
from ditq_converters.demo.classifier import FEATURES, score

PEAK = 2.0  # images lie in [-1, 1]
FEWEST_FOR_FD = FEATURES + 1


@dataclass(frozen=True)
class Baseline:
    """The float model and its run, which every variant is compared with.

    Attributes:
        name: of the demo model, for progress bars.
        pipe: the float pipeline.
        plan: what was sampled.
        calls: its calls.
    """

    name: str
    pipe: Any
    plan: SamplingPlan
    calls: list[Call]

    def subset(self, samples: int) -> Baseline:
        """The first `samples` samples of the run."""
        calls = [
            Call(c.index, c.timestep, c.latents[:samples], c.epsilon[:samples], c.after[:samples])
            for c in self.calls
        ]
        return Baseline(
            self.name, self.pipe, replace(self.plan, labels=self.plan.labels[:samples]), calls
        )

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Any]:
        """Final latents [S, C, H, W] -> PIL images, through the pipeline's VAE."""
        pixels = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        array = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()
        return self.pipe.numpy_to_pil(array)


def paired_psnr(reference: torch.Tensor, images: torch.Tensor) -> float:
    """PSNR in dB of images [S, C, H, W] in [-1, 1] against those of equal seeds; mean over samples of the error."""
    clamped = (images.clamp(-1, 1).double() - reference.clamp(-1, 1).double()).pow(2).mean()
    return 10 * float((PEAK**2 / clamped).log10())


def score_samples(latents: torch.Tensor, labels: tuple[int, ...]) -> dict[str, float | None]:
    """Accuracy, mean probability of the right class, and digit-FD of final latents [S, 1, 8, 8].

    digit-FD is None below FEWEST_FOR_FD samples, where the covariance of its 64 features is singular.
    """
    result = score(latents.clamp(-1, 1), torch.tensor(labels))
    return {
        "accuracy": result.accuracy,
        "mean_probability": result.mean_probability,
        "digit_fd": result.digit_fd if len(labels) >= FEWEST_FOR_FD else None,
    }
