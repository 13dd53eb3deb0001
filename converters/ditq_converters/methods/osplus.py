"""Outlier Suppression+ (Wei et al., arXiv:2304.09145): shift channels to their centre, then scale them.

A channel that lies far from zero wastes the range of a token's scale; moved to its centre (Eq. 3) only its width is
left. The shift is one constant per channel, so it costs nothing where a producer takes it (AdaLN, norms with a bias,
V), and through `b + W z` the function stays the same (Eq. 5). We depart from the paper in the scale: it searches a
threshold per layer (Eq. 8), we take SmoothQuant's closed form on the shifted input, with one alpha for all. Made for
activations with a zero point per token (`token_asym`), which the shift keeps from being spent on an offset.
"""

from __future__ import annotations

from collections.abc import Sequence

from ditq_converters.methods.base import BlockTransform, Method, SiteData, Transform
from ditq_converters.methods.smoothquant import SmoothQuantOptions, smooth_factor


def transform(sites: Sequence[SiteData], options: SmoothQuantOptions) -> BlockTransform:
    """Shift what can be shifted to the centre of its range over all calls; scale by what is left."""
    chosen = {site.name: _site(site, options.alpha) for site in sites}
    return BlockTransform(chosen, (0,) * len(sites[0].minimum))


def _site(site: SiteData, alpha: float) -> Transform:
    low, high = site.minimum.amin(dim=0).double(), site.maximum.amax(dim=0).double()
    if site.shifts == "none":
        return Transform(smooth_factor(site.absmax.amax(dim=0), site.weight_absmax, alpha))
    centre, half = (high + low) / 2, (high - low) / 2  # Eq. 3
    return Transform(smooth_factor(half, site.weight_absmax, alpha), centre[None])


OSPLUS = Method(
    name="osplus",
    source="Outlier Suppression+, arXiv:2304.09145, Eq. 3 and 5; SmoothQuant's scale on the shifted input",
    needs_statistics=True,
    transform=transform,
    options=SmoothQuantOptions,
)
