"""What an evaluation is asked and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ditq_converters.calibrate.run import SAMPLERS as CALIBRATION_SAMPLERS
from ditq_converters.evaluate.layer_error import LayerErrors
from ditq_converters.evaluate.sqnr import SqnrCurve

SAMPLERS = tuple(name for name in CALIBRATION_SAMPLERS if name != "t_max")  # draws no image


@dataclass(frozen=True)
class EvaluationSettings:
    """How much of everything.

    Attributes:
        steps: model calls per sample.
        samples: images per model, for free SQNR, images and Frechet distances.
        few_samples: of those, for forced SQNR, halves and the error per layer.
        guidance: classifier-free guidance weight; at 1 or below there is none.
        seed: of classes and noise; not the calibration's default, so that no model is judged on its calibration noise.
        micro_batch: samples per forward.
        sampler: one of SAMPLERS; None: flow for flow-matching models, else ddim.
        halves: also the SQNR of the conditional and the null prediction on their own.
        features: `module:function` of a feature extractor for one more Frechet distance; "" for none.
        lpips: also LPIPS, by torchmetrics.
        fid: also the Frechet distance on Inception features, by torch-fidelity.
    """

    steps: int = 50
    samples: int = 50
    few_samples: int = 16
    guidance: float = 1.5
    seed: int = 1
    micro_batch: int = 32
    sampler: str | None = None
    halves: bool = False
    features: str = ""
    lpips: bool = False
    fid: bool = False

    def quick(self) -> EvaluationSettings:
        """At most 10 steps and 10 samples: seconds on a demo model, and rougher figures."""
        return replace(
            self,
            steps=min(self.steps, 10),
            samples=min(self.samples, 10),
            few_samples=min(self.few_samples, 4),
        )


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        figures: JSON-safe; the content of report.json.
        timesteps: of the calls, noisiest first.
        sqnr: "free", "forced", and with halves "cond free" and so on.
        layers: errors of linears in cascade, and of forced blocks.
        clip: (linears with static activations, share of inputs cut off, fp64 [linears, calls]).
        latents: "float" and "packed" -> final latents [S, C, H, W].
        images: "float" and "packed" -> [S, C, H, W] fp32 in [-1, 1]; None without a VAE.
    """

    figures: dict[str, Any]
    timesteps: list[float]
    sqnr: dict[str, SqnrCurve]
    layers: tuple[LayerErrors, LayerErrors]
    clip: tuple[list[str], torch.Tensor]
    latents: dict[str, torch.Tensor]
    images: dict[str, torch.Tensor] | None
