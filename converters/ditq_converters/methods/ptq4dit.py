"""PTQ4DiT (arXiv:2405.16005): channel-wise salience balancing over Spearman-weighted calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ditq_converters.methods.base import BlockTransform, Method, SiteData, Transform
from ditq_converters.methods.smoothquant import smooth_factor

MAX_CALLS = 25  # calibration calls of the paper at 256 pixels
ALPHA = 0.5  # CSB: s = sqrt(a / w)


@dataclass(frozen=True)
class Ptq4ditOptions:
    """Choices of PTQ4DiT.

    Attributes:
        ssc: weigh calls by Spearman's rho; otherwise take the middle call.
    """

    ssc: bool = True


def calibration_calls(num_calls: int) -> list[int]:
    """The calls that count: all up to 25, else 25 uniform ones, i_j = floor(j T / 25)."""
    used = min(num_calls, MAX_CALLS)
    return [j * num_calls // used for j in range(used)]


def average_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1 along the last dimension; equal values share the mean of their ranks.

    Args:
        values: [..., K] float.

    Returns:
        [..., K] fp64.
    """
    ordered, values = values.sort(dim=-1).values.contiguous(), values.contiguous()
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1).double() / 2


def spearman(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation: Pearson's of the average ranks; 0 where either side is constant.

    Args:
        x: [n, K] float, salience of activations per call.
        w: [K] float, salience of weights.

    Returns:
        [n] fp64 in [-1, 1].
    """
    mean_rank = (x.shape[1] + 1) / 2
    x_rank, w_rank = average_ranks(x) - mean_rank, average_ranks(w) - mean_rank
    # multiples of 1/4 far below 2^53: sums are exact, so a constant side gives exactly 0
    variances = x_rank.square().sum(dim=1) * w_rank.square().sum()
    rho = (x_rank * w_rank).sum(dim=1) / variances.sqrt()
    return torch.where(variances > 0, rho, torch.zeros_like(rho)).clamp(-1, 1)


def call_weights(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """SSC, Eq. 11: eta = softmax(-rho) over calls; calls whose outliers complement the weights' count more.

    Args:
        x: [n, K] fp64, salience of activations per call.
        w: [K] fp64, salience of weights.

    Returns:
        [n] fp64, positive, sum 1.
    """
    return torch.softmax(-spearman(x, w), dim=0)


def aggregate(site: SiteData, ssc: bool) -> torch.Tensor:
    """The salience that stands for all calls, [K] fp64: sum_i eta_i s(X_i) (Eq. 10), or that of the middle call."""
    salience = site.absmax
    if not ssc:
        return salience[len(salience) // 2]
    salience = salience[calibration_calls(len(salience))]
    eta = call_weights(salience, site.weight_absmax)
    return (eta[:, None] * salience).sum(dim=0)


def transform(sites: Sequence[SiteData], options: Ptq4ditOptions) -> BlockTransform:
    """CSB, Eq. 5-7 and 14: balance every site; the plan leaves the second MLP layer out, as the paper does."""
    transforms = {
        site.name: Transform(smooth_factor(aggregate(site, options.ssc), site.weight_absmax, ALPHA))
        for site in sites
    }
    return BlockTransform(transforms, (0,) * len(sites[0].minimum))


PTQ4DIT = Method(
    name="ptq4dit",
    source="PTQ4DiT, arXiv:2405.16005, Eq. 4-14",
    needs_statistics=True,
    transform=transform,
    options=Ptq4ditOptions,
    on_the_fly=False,
    attention="int8",
)
