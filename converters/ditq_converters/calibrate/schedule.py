"""Timesteps of several runs on one axis, noisiest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Schedule:
    """T bins of neighbouring timesteps.

    Attributes:
        timesteps: [T] of each bin, noisiest first: the one in it, or the mean of those in it.
        bin_of: timestep -> its bin.
    """

    timesteps: tuple[float, ...]
    bin_of: dict[float, int]


def schedule_of(runs: Sequence[Sequence[float]]) -> Schedule:
    """The axis of several runs.

    Noise falls during a run, so the runs themselves say whether a high timestep means much noise or little. Where all
    runs have the same timesteps each is a bin. Where they differ (other numbers of steps, sizes that shift a flow's
    schedule, image-to-image that begins late) there are as many bins as the longest run has timesteps, of neighbours
    in noise, as evenly filled as can be, so that a method that averages over calls sees as many as one run makes.

    Args:
        runs: timesteps in the order they were met, repetitions allowed; at least one in all.
    """
    falling = sum(run[0] - run[-1] for run in runs if run)
    distinct = sorted({t for run in runs for t in run}, reverse=falling >= 0)
    count = max(len(set(run)) for run in runs)
    edges = [len(distinct) * i // count for i in range(count + 1)]
    members = [distinct[a:b] for a, b in pairwise(edges)]
    return Schedule(
        tuple(part[0] if len(part) == 1 else sum(part) / len(part) for part in members),
        {t: index for index, part in enumerate(members) for t in part},
    )
