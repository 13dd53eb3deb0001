"""Boundaries between the timestep groups of a block."""

from __future__ import annotations

from itertools import pairwise

import torch

from ditq_converters.calibrate.stats import StatisticsError


def group_bounds(timesteps: list[float], group_of_call: tuple[int, ...]) -> torch.Tensor:
    """Boundaries between timestep groups: midpoints of the timesteps on both sides.

    Args:
        timesteps: [T] of every call, noisiest first.
        group_of_call: [T] group of every call, rising.

    Returns:
        fp32 [G - 1], ascending timesteps; the last group of calls lies below the first boundary.

    Raises:
        StatisticsError: the timesteps do not fall strictly.
    """
    if any(later >= earlier for earlier, later in pairwise(timesteps)):
        raise StatisticsError(
            "timestep groups need timesteps that fall at every call; calibrate with ddim or ddpm"
        )
    edges = [i for i in range(1, len(timesteps)) if group_of_call[i] != group_of_call[i - 1]]
    middles = [(timesteps[i - 1] + timesteps[i]) / 2 for i in reversed(edges)]
    return torch.tensor(middles, dtype=torch.float32)
