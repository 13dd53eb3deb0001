"""HTG (arXiv:2503.06930): shift channels per group of timesteps, then scale them by a moving average of their range.

Where the paper is ambiguous or wrong we read it as follows: groups are floor(T / 10), as its Table 3 shows; the maxima
of Eq. 6 and 7 and of the weights are of absolute values, for signed ones may be negative once the shift is shared by a
group; the X of Eq. 7 has the group's shift, as defined after Eq. 5; and the shifted input owes `W z` to the bias (Eq. 5
and 8, which Eq. 6 drops). Groups are clustered once a block, so that all its layers switch together; with
`groups_per_layer` every layer has its own, as in the paper's Alg. 2. A block then switches where any of its layers
does, and a layer that does not keeps its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ditq_converters.methods import timestep_groups
from ditq_converters.methods.base import BlockTransform, Method, SiteData, Transform, check_kind
from ditq_converters.methods.smoothquant import check_fraction, smooth_factor

CALLS_PER_GROUP = 10
ALPHA = 0.5  # s = sqrt(m / w)
LINKAGES = (*timestep_groups.LINKAGES, "exact_dp")


@dataclass(frozen=True)
class HtgOptions:
    """Choices of HTG.

    Attributes:
        shift: shift channels per timestep group.
        scale: scale channels.
        num_groups: timestep groups; None: max(1, T // 10).
        linkage: `ward`, `centroid`, `average` or `exact_dp`.
        ema: coefficient of the moving average of channel ranges, in [0, 1].
        groups_per_layer: every layer has timestep groups of its own (Alg. 2); else the layers of a block share theirs.
    """

    shift: bool = True
    scale: bool = True
    num_groups: int | None = None
    linkage: str = "ward"
    ema: float = 0.99
    groups_per_layer: bool = False

    def __post_init__(self) -> None:
        """Check ranges and names."""
        check_fraction("ema", self.ema)
        if self.linkage not in LINKAGES:
            raise ValueError(
                f"option linkage must be one of {', '.join(LINKAGES)}, got {self.linkage!r}"
            )
        if self.num_groups is not None:
            check_kind("option num_groups", 1, self.num_groups)
        if self.num_groups is not None and self.num_groups < 1:
            raise ValueError(f"option num_groups must be at least 1, got {self.num_groups}")


def channel_centres(site: SiteData) -> torch.Tensor:
    """Eq. 2: z_i = (max X_i + min X_i) / 2, [T, K] fp64."""
    return (site.maximum.double() + site.minimum.double()) / 2


def group_calls(sites: Sequence[SiteData], options: HtgOptions) -> tuple[int, ...]:
    """One partition of the calls for a block, from the concatenated centres of the sites shifted per group (Eq. 3).

    Args:
        sites: of one block.
        options: `num_groups`, `linkage`; with `shift` off there is one group.

    Returns:
        [T] timestep group of every call.

    Raises:
        ValueError: an unknown linkage, or fewer than one group.
    """
    num_calls = len(sites[0].minimum)
    grouped = [channel_centres(site) for site in sites if site.shifts == "groups"]
    if not options.shift or not grouped:
        return (0,) * num_calls
    wanted = options.num_groups
    if wanted is None:
        wanted = max(1, num_calls // CALLS_PER_GROUP)
    z, wanted = torch.cat(grouped, dim=1), min(wanted, num_calls)
    if options.linkage == "exact_dp":
        return timestep_groups.exact_dp(z, wanted)
    return timestep_groups.greedy(z, wanted, options.linkage)


def group_means(z: torch.Tensor, group_of_call: Sequence[int]) -> torch.Tensor:
    """Eq. 4: zb_g, the mean of z_i over the calls of each group, [G, K] fp64 from z [T, K] fp64."""
    group = torch.tensor(group_of_call)
    return torch.stack([z[group == g].mean(dim=0) for g in range(group_of_call[-1] + 1)])


def shifted_absmax(site: SiteData, shift_of_call: torch.Tensor) -> torch.Tensor:
    """Largest |X_i - zb_g(i)| per call and channel: half the range of X_i plus |z_i - zb_g(i)|.

    Args:
        site: one linear input.
        shift_of_call: [T, K] fp64, the shift in force at each call.

    Returns:
        [T, K] fp64.
    """
    above = site.maximum.double() - shift_of_call
    below = site.minimum.double() - shift_of_call
    return torch.maximum(above.abs(), below.abs())


def moving_average(absmax: torch.Tensor, coefficient: float) -> torch.Tensor:
    """Eq. 7, from the noisiest call to the cleanest: m = A_0, then m = c m + (1 - c) A_i.

    With the paper's c = 0.99 the noisiest call weighs 0.99^(T - 1): 0.37 of the whole for 100 calls.

    Args:
        absmax: [T, K] fp64, noisiest first.
        coefficient: c in [0, 1].

    Returns:
        [K] fp64.
    """
    mean = absmax[0]
    for current in absmax[1:]:
        mean = coefficient * mean + (1 - coefficient) * current
    return mean


def transform(sites: Sequence[SiteData], options: HtgOptions) -> BlockTransform:
    """Shift and scale every site; the plan leaves the second MLP layer out, as the paper does.

    Sites with one shift for all calls (behind V, whose producer sees all groups) get the mean of z_i.
    """
    together = [[site] for site in sites] if options.groups_per_layer else [sites]
    own = {site.name: group_calls(part, options) for part in together for site in part}
    group_of_call = timestep_groups.refinement(list(own.values()))
    transforms = {}
    if options.shift or options.scale:
        for site in sites:
            if site.shifts == "groups":
                found = _site_transform(site, own[site.name], options)
                transforms[site.name] = _in_groups(found, own[site.name], group_of_call)
            else:
                transforms[site.name] = _site_transform(site, (0,) * len(group_of_call), options)
    return BlockTransform(transforms, group_of_call)


def _in_groups(found: Transform, own: Sequence[int], group_of_call: Sequence[int]) -> Transform:
    """A transform of a layer's own groups as one of its block's, each of which lies in one of the layer's."""
    if found.shift is None:
        return found
    rows = [own[group_of_call.index(group)] for group in range(group_of_call[-1] + 1)]
    return Transform(found.smooth, found.shift[rows])


def _site_transform(site: SiteData, groups: Sequence[int], options: HtgOptions) -> Transform:
    shifted = options.shift and site.shifts != "none"
    shift = group_means(channel_centres(site), groups) if shifted else None
    if not options.scale:
        return Transform(shift=shift)
    no_shift = torch.zeros(len(groups), site.minimum.shape[1], dtype=torch.float64)
    absmax = shifted_absmax(site, no_shift if shift is None else shift[list(groups)])
    m = moving_average(absmax, options.ema)
    return Transform(smooth_factor(m, site.weight_absmax, ALPHA), shift)


HTG = Method(
    name="htg",
    source="HTG, arXiv:2503.06930, Eq. 2-8 and Alg. 1",
    needs_statistics=True,
    transform=transform,
    options=HtgOptions,
    on_the_fly=False,
    attention="int8",
    over_time=True,
)
