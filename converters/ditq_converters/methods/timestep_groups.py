"""Timestep groups: contiguous clusters of model calls whose channels are centred alike (HTG, arXiv:2503.06930, Eq. 3).

Algorithm 1 of the paper is greedy and does not name its linkage; Ward's is our default. Eq. 3 itself, the sum of
distances to the mean of one's group, is minimized exactly by dynamic programming, as an alternative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

LINKAGES = ("ward", "centroid", "average")


def greedy(z: torch.Tensor, num_groups: int, linkage: str = "ward") -> tuple[int, ...]:
    """Algorithm 1: start from single calls, merge the nearest two neighbours until `num_groups` are left.

    The distance between neighbours a and b, of na and nb calls with means mu_a and mu_b, is

    - `ward`: na nb / (na + nb) |mu_a - mu_b|^2, the growth of the squared form of Eq. 3;
    - `centroid`: |mu_a - mu_b|;
    - `average`: the mean of |z_p - z_q| over p in a and q in b.

    Of equal distances the earliest pair merges. The result need not minimize Eq. 3.

    Args:
        z: [T, K] float, channel centres per call, noisiest first.
        num_groups: 1 to T.
        linkage: one of `LINKAGES`.

    Returns:
        [T] group of every call: starts at 0, never falls, rises by at most 1.

    Raises:
        ValueError: an unknown linkage, or a number of groups outside 1 to T.
    """
    _check(z, num_groups)
    distance = _distance(z.double(), linkage)
    bounds = list(range(len(z) + 1))  # group g: calls bounds[g] to bounds[g + 1] - 1
    distances = [distance(*bounds[g : g + 3]) for g in range(len(z) - 1)]
    while len(bounds) - 1 > num_groups:
        nearest = distances.index(min(distances))  # the first of equals
        del bounds[nearest + 1], distances[nearest]
        for g in (nearest - 1, nearest):
            if 0 <= g < len(distances):
                distances[g] = distance(*bounds[g : g + 3])
    return _group_of_call(bounds)


def exact_dp(z: torch.Tensor, num_groups: int, squared: bool = False) -> tuple[int, ...]:
    """The contiguous partition that minimizes Eq. 3, sum_i |z_i - mean of its group|, or its squared form.

    Dynamic programming over segments, O(T^3). Distances come from the Gram matrix of the centred z, so one that is
    below 1e-7 of the largest |z_i| is rounding noise: partitions closer than that count as equally good.

    Args:
        z: [T, K] float, channel centres per call, noisiest first.
        num_groups: 1 to T, all of them used.
        squared: minimize the sum of squared distances instead.

    Returns:
        [T] group of every call: starts at 0, never falls, rises by at most 1.

    Raises:
        ValueError: a number of groups outside 1 to T.
    """
    _check(z, num_groups)
    costs = _segment_costs(z.double(), squared)  # [T, T + 1]
    best, starts = costs[0], []  # best[b]: least cost of the calls before b in the groups so far
    for _ in range(num_groups - 1):
        totals = best[:-1, None] + costs  # [a, b]: the last group is a to b - 1
        start = totals.argmin(dim=0)
        best = totals.gather(0, start[None])[0]
        starts.append(start)
    bounds = [len(z)]
    for start in reversed(starts):
        bounds.insert(0, int(start[bounds[0]]))
    return _group_of_call([0, *bounds])


def refinement(partitions: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The coarsest groups of which each lies in one group of every partition: a new one begins where any changes.

    Args:
        partitions: at least one; [T] group of every call each.

    Returns:
        [T] group of every call; starts at 0, never falls, rises by at most 1.
    """
    groups = [0]
    for earlier, later in pairwise(zip(*partitions, strict=True)):
        groups.append(groups[-1] + (earlier != later))
    return tuple(groups)


def _distance(z: torch.Tensor, linkage: str) -> Callable[[int, int, int], float]:
    """The distance between the neighbours [first, middle) and [middle, last)."""
    if linkage == "average":
        pairs = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")  # [T, T]
        return lambda first, middle, last: float(pairs[first:middle, middle:last].mean())
    if linkage not in LINKAGES:
        raise ValueError(f"timestep_groups: linkage must be {', '.join(LINKAGES)}, got {linkage!r}")

    def between_means(first: int, middle: int, last: int) -> float:
        gap = z[first:middle].mean(dim=0) - z[middle:last].mean(dim=0)
        if linkage == "centroid":
            return float(gap.norm())
        return (middle - first) * (last - middle) / (last - first) * float(gap.square().sum())

    return between_means


def _segment_costs(z: torch.Tensor, squared: bool) -> torch.Tensor:
    """[T, T + 1] fp64: the cost of one group of the calls a to b - 1; infinite where b <= a."""
    num_calls = len(z)
    z = z - z.mean(dim=0)  # distances do not change, their rounding does
    gram = z @ z.T
    costs = torch.full((num_calls, num_calls + 1), torch.inf, dtype=torch.float64)
    for a in range(num_calls):
        products = gram[a:, a:]
        size = torch.arange(1, num_calls - a + 1, dtype=torch.float64)
        with_sum = products.cumsum(dim=1)  # [i, b]: z_i . (z_a + ... + z_b)
        sum_norm = with_sum.cumsum(dim=0).diagonal()  # [b]: |z_a + ... + z_b|^2
        to_mean = products.diagonal()[:, None] - 2 * with_sum / size + sum_norm / size**2
        to_mean = to_mean.clamp_min(0).triu()  # [i, b]: |z_i - mean|^2 of the members i <= b
        costs[a, a + 1 :] = (to_mean if squared else to_mean.sqrt()).sum(dim=0)
    return costs


def _check(z: torch.Tensor, num_groups: int) -> None:
    if not 1 <= num_groups <= len(z):
        raise ValueError(
            f"timestep_groups: num_groups must be 1 to {len(z)}, the number of calls, got {num_groups}"
        )


def _group_of_call(bounds: list[int]) -> tuple[int, ...]:
    return tuple(g for g in range(len(bounds) - 1) for _ in range(bounds[g], bounds[g + 1]))
