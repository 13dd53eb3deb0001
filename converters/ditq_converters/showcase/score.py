"""Judge samples: against the float model's, and by the digit classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ditq_converters.demo.classifier import FEATURES, score
from ditq_converters.evaluate.runs import Run, run
from ditq_runtime.calls.inputs import Input, gather
from ditq_runtime.calls.labels import class_ids, draw

PEAK = 2.0  # images lie in [-1, 1]
FEWEST_FOR_FD = FEATURES + 1


@dataclass(frozen=True)
class Baseline:
    """The float model and its run, which every variant is compared with.

    Attributes:
        name: of the demo model, for progress bars.
        pipe: the float pipeline.
        inputs: what was drawn.
        labels: class of every sample.
        run: what it did.
    """

    name: str
    pipe: Any
    inputs: list[Input]
    labels: tuple[int, ...]
    run: Run

    @classmethod
    def of(
        cls, name: str, pipe: Any, samples: int, few: int, seed: int, tick: Any = None, **how: Any
    ) -> Baseline:
        """Draw samples of classes, the first `few` in calls that are recorded.

        Args:
            name: of the model.
            pipe: the float pipeline.
            samples: how many in all.
            few: how many recorded.
            seed: of classes and noise.
            tick: told when a call is over.
            how: further arguments of `gather`.
        """
        labels = draw(class_ids(pipe), samples, seed)
        inputs = gather(name, pipe, labels=labels, batch=few, seed=seed, **how)
        return cls(name, pipe, inputs, labels, run(pipe, inputs, few=few, tick=tick))

    @property
    def latents(self) -> torch.Tensor:
        """[S, 1, 8, 8] final latents."""
        assert self.run.latents is not None
        return self.run.latents

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Any]:
        """Final latents [S, C, H, W] -> PIL images, through the pipeline's VAE."""
        pixels = self.pipe.vae.decode(latents).sample
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
