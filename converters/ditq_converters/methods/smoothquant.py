"""SmoothQuant (Xiao et al., arXiv:2211.10438): move outliers from activations into weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ditq_converters.methods.base import BlockTransform, Method, SiteData, Transform

GUARD = 1e-5  # smallest absmax that enters the formula
LIMIT = 1e4  # factors stay in [1 / LIMIT, LIMIT]


@dataclass(frozen=True)
class SmoothQuantOptions:
    """Choices of SmoothQuant.

    Attributes:
        alpha: migration strength, s = a^alpha / w^(1 - alpha) (Eq. 4), in [0, 1].
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Check the range."""
        check_fraction("alpha", self.alpha)


def check_fraction(name: str, value: float) -> None:
    """ValueError for an option outside [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"option {name} must lie in [0, 1], got {value}")


def smooth_factor(a: torch.Tensor, w: torch.Tensor, alpha: float) -> torch.Tensor:
    """Eq. 4: s[k] = a[k]^alpha / w[k]^(1 - alpha). All methods here share it and differ in `a`.

    Args:
        a: [K] fp64, aggregated largest |x| per channel.
        w: [K] fp64, largest |W| per channel.
        alpha: migration strength in [0, 1].

    Returns:
        [K] fp64, in [1e-4, 1e4].
    """
    a, w = a.clamp_min(GUARD), w.clamp_min(GUARD)
    return (a**alpha / w ** (1 - alpha)).clamp(1 / LIMIT, LIMIT)


def transform(sites: Sequence[SiteData], options: SmoothQuantOptions) -> BlockTransform:
    """Smooth every site with the maximum over all calls."""
    factors = {
        site.name: Transform(
            smooth_factor(site.absmax.amax(dim=0), site.weight_absmax, options.alpha)
        )
        for site in sites
    }
    return BlockTransform(factors, (0,) * len(sites[0].minimum))


SMOOTHQUANT = Method(
    name="smoothquant",
    source="SmoothQuant, arXiv:2211.10438, Eq. 4, with the maximum over all calls",
    needs_statistics=True,
    transform=transform,
    options=SmoothQuantOptions,
)
