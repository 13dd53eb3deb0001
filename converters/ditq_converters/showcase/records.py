"""What a showcase is asked and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ditq_converters.calibrate.stats import CalibrationStats


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
        steps: model calls per sample, in calibration and in sampling; of a flow model at most.
        guidance: classifier-free guidance weight; a flow model has its own.
        calibration_samples: images sampled to calibrate a DiT.
        scored_samples: images per model of `demo:digits`, for free SQNR, PSNR, accuracy and digit-FD.
        salient_samples: images per model of `demo:digits-salient`, for SQNR.
        flow_samples: images per model of `demo:digits-flow`.
        flow_salient_samples: images per model of `demo:digits-flow-salient`.
        flow_calibration_samples: images sampled to calibrate a flow model.
        few_samples: images for the forced SQNR and the error per layer.
        seed: of the calibration; sampling uses seed + 1, so that no model is judged on its calibration noise.
    """

    steps: int = 50
    guidance: float = 1.5
    calibration_samples: int = 32
    scored_samples: int = 100
    salient_samples: int = 10
    few_samples: int = 20
    flow_samples: int = 40
    flow_salient_samples: int = 10
    flow_calibration_samples: int = 10
    seed: int = 0

    @classmethod
    def quick(cls) -> Settings:
        """A run of well under a minute; its figures are rougher."""
        return cls(
            steps=10,
            calibration_samples=10,
            scored_samples=20,
            salient_samples=10,
            few_samples=5,
            flow_samples=10,
            flow_salient_samples=5,
            flow_calibration_samples=5,
        )


@dataclass(frozen=True)
class Study:
    """One demo model and its packed variants.

    Attributes:
        figures: JSON-safe results.
        samples: model name -> images [S, 1, 32, 32] in [-1, 1].
        labels: class of each sample.
        stats: its calibration.
        layers: variant -> (layer names, errors [layers, steps]), where measured.
    """

    figures: dict[str, Any]
    samples: dict[str, torch.Tensor]
    labels: tuple[int, ...]
    stats: CalibrationStats
    layers: dict[str, tuple[list[str], torch.Tensor]]
