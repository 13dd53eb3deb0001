"""What a method is given and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SiteData:
    """What is known about one linear input.

    Attributes:
        minimum: [T, K] fp32, per call (noisiest first) and channel, over all samples, CFG halves and tokens.
        maximum: [T, K] fp32.
        weight_absmax: [K] fp64, largest |W[n, k]| over all outputs of all linears that read the site.
    """

    minimum: torch.Tensor
    maximum: torch.Tensor
    weight_absmax: torch.Tensor

    @property
    def absmax(self) -> torch.Tensor:
        """[T, K] fp64: largest |x| per call and channel."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs()).double()


@dataclass(frozen=True)
class Method:
    """A published method.

    Attributes:
        name: as in `--method`.
        source: paper and equation.
        needs_statistics: whether `smooth` reads the calibration.
        smooth: (site, alpha) -> [K] fp64, the factor its activations are divided by; None: no transform at all.
    """

    name: str
    source: str
    needs_statistics: bool
    smooth: Callable[[SiteData, float], torch.Tensor] | None
