"""SmoothQuant (Xiao et al., arXiv:2211.10438): move outliers from activations into weights."""

from __future__ import annotations

import torch

from ditq_converters.methods.base import Method, SiteData

GUARD = 1e-5  # smallest absmax that enters the formula
LIMIT = 1e4  # factors stay in [1 / LIMIT, LIMIT]


def smooth(site: SiteData, alpha: float) -> torch.Tensor:
    """Eq. 4: s[k] = a[k]^alpha / w[k]^(1 - alpha), a the largest |x| of channel k over all calls.

    Args:
        site: statistics and weights of one linear input.
        alpha: migration strength in [0, 1].

    Returns:
        [K] fp64, in [1e-4, 1e4].
    """
    a = site.absmax.amax(dim=0).clamp_min(GUARD)
    w = site.weight_absmax.clamp_min(GUARD)
    return (a**alpha / w ** (1 - alpha)).clamp(1 / LIMIT, LIMIT)


SMOOTHQUANT = Method(
    name="smoothquant",
    source="SmoothQuant, arXiv:2211.10438, Eq. 4, with the maximum over all calls",
    needs_statistics=True,
    smooth=smooth,
)
