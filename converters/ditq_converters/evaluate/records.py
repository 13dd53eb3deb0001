"""What an evaluation is asked and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ditq_converters.evaluate.layer_error import LayerErrors
from ditq_converters.evaluate.sqnr import SqnrCurve


@dataclass(frozen=True)
class EvaluationSettings:
    """How much of everything.

    Attributes:
        steps: for inputs that name none; None: the pipeline's own, 50 for classes.
        samples: images per model drawn from short forms; None: all prompts, 50 classes. For free SQNR, images and
            Frechet distances.
        few_samples: of those, for forced SQNR and the error per layer: whole calls, until there are so many.
        guidance: for inputs that name none; None: the pipeline's own, 1.5 for classes.
        seed: of classes and noise; not the calibration's default, so that no model is judged on its calibration noise.
        micro_batch: samples per call of a short form of classes.
        sampler: another scheduler, one of `ditq_runtime.calls.schedulers.SAMPLERS`; None: the pipeline's own.
        features: `module:function` of a feature extractor for one more Frechet distance; "" for none.
        lpips: also LPIPS, by torchmetrics.
        fid: also the Frechet distance on Inception features, by torch-fidelity.
    """

    steps: int | None = None
    samples: int | None = None
    few_samples: int = 16
    guidance: float | None = None
    seed: int = 1
    micro_batch: int = 32
    sampler: str | None = None
    features: str = ""
    lpips: bool = False
    fid: bool = False

    def quick(self) -> EvaluationSettings:
        """At most 10 steps and 10 samples: seconds on a demo model, and rougher figures."""
        return replace(
            self,
            steps=min(self.steps or 10, 10),
            samples=min(self.samples or 10, 10),
            few_samples=min(self.few_samples, 4),
        )


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        figures: JSON-safe; the content of report.json.
        timesteps: that the transformers were told, noisiest first.
        sqnr: "free" and "forced".
        layers: errors of linears in cascade, and of forced blocks.
        clip: (linears with static activations, share of inputs cut off, fp64 [linears, T]).
        latents: "float" and "packed" -> final latents [S, ...]; empty where a pipeline hides them.
        images: "float" and "packed" -> [S, C, H, W] fp32 in [-1, 1]; None without a VAE.
    """

    figures: dict[str, Any]
    timesteps: list[float]
    sqnr: dict[str, SqnrCurve]
    layers: tuple[LayerErrors, LayerErrors]
    clip: tuple[list[str], torch.Tensor]
    latents: dict[str, torch.Tensor]
    images: dict[str, torch.Tensor] | None
