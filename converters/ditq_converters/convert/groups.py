"""Timestep groups of a block: in the order of the timestep that the model is told, and the boundaries between them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from ditq_converters.calibrate.stats import StatisticsError
from ditq_converters.methods import BlockTransform, Transform


def by_timestep(choice: BlockTransform, timesteps: list[float]) -> BlockTransform:
    """Groups by falling timestep, as all that stores them expects, where a method numbered them by falling noise.

    For most models that is the same; Z-Image and Lumina2 are told a timestep that rises while noise falls.

    Args:
        choice: of the methods.
        timesteps: [T] of every call, noisiest first.
    """
    if choice.num_groups == 1 or timesteps[0] > timesteps[-1]:
        return choice
    last = choice.num_groups - 1
    sites = {name: _reversed(transform) for name, transform in choice.sites.items()}
    return BlockTransform(sites, tuple(last - group for group in choice.group_of_call))


def _reversed(transform: Transform) -> Transform:
    return (
        transform if transform.shift is None else replace(transform, shift=transform.shift.flip(0))
    )


def group_bounds(timesteps: list[float], group_of_call: tuple[int, ...]) -> torch.Tensor:
    """Boundaries between timestep groups: midpoints of the timesteps on both sides.

    Args:
        timesteps: [T] of every call, noisiest first.
        group_of_call: [T] group of every call, by falling timestep.

    Returns:
        fp32 [G - 1], ascending timesteps; the last group lies below the first boundary.

    Raises:
        StatisticsError: the timesteps neither fall at every call nor rise at every call.
    """
    falls = [earlier > later for earlier, later in pairwise(timesteps)]
    if len(set(falls)) > 1 or len(set(timesteps)) < len(timesteps):
        raise StatisticsError(
            "timestep groups need timesteps that fall at every call, or rise at every call; calibrate with ddim or ddpm"
        )
    edges = [i for i in range(1, len(timesteps)) if group_of_call[i] != group_of_call[i - 1]]
    middles = sorted((timesteps[i - 1] + timesteps[i]) / 2 for i in edges)
    return torch.tensor(middles, dtype=torch.float32)
