"""Which input rows a calibration keeps for searches: fixed in advance by counters, the same for every site."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ditq_converters.calibrate.trajectory import noise_generator

ROW_CALLS = 50  # rows are kept at this many calls at most
ROW_STREAM = -2  # counter that no noise (calls from 0) and no label (-1) uses


@dataclass(frozen=True)
class RowPlan:
    """Which rows to keep.

    Attributes:
        count: rows n per site and call; 0 keeps none. Under guidance every other of them is of the null half.
        calls: the calls at which rows are kept, ascending.
        samples: images S in the run.
        guided: whether a forward holds [cond; null].
        seed: of the choice.

    Raises:
        ValueError: a negative count.
    """

    count: int
    calls: tuple[int, ...]
    samples: int
    guided: bool
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the count."""
        if self.count < 0:
            raise ValueError(f"calibrate: rows must be 0 (none) or more, got {self.count}")

    def select(self, call: int, tokens: int) -> Selection:
        """The rows of one call, for sites with `tokens` rows per sample."""
        conditional = (self.count + 1) // 2 if self.guided else self.count
        generator = noise_generator(self.seed, call, ROW_STREAM)
        drawn = torch.randperm(self.samples * tokens, generator=generator)[:conditional]
        null = min(self.count // 2, len(drawn)) if self.guided else 0
        return Selection(drawn // tokens, drawn % tokens, null)


@dataclass(frozen=True)
class Selection:
    """Chosen rows: all of the conditional half, then the first `null` of them again, of the null half.

    Attributes:
        sample: [m] int64.
        token: [m] int64.
        null: how many pairs are also taken from the null half.
    """

    sample: torch.Tensor
    token: torch.Tensor
    null: int

    @property
    def count(self) -> int:
        """Rows in all."""
        return len(self.sample) + self.null

    def locate(self, start: int, size: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that lie in one forward of the samples `start` to `start + size`.

        Args:
            start: first sample of the forward.
            size: its samples; its batch is [size cond; size null] under guidance, [size cond] without.
            tokens: rows per sample.

        Returns:
            slot: [r] int64, positions in the kept rows. row: [r] int64, rows of the flattened batch.
        """
        sample = torch.cat([self.sample, self.sample[: self.null]])
        token = torch.cat([self.token, self.token[: self.null]])
        half = (torch.arange(self.count) >= len(self.sample)).long()
        slot = ((sample >= start) & (sample < start + size)).nonzero().squeeze(1)
        return slot, ((half * size + sample - start) * tokens + token)[slot]


def evenly_spaced(calls: int, most: int = ROW_CALLS) -> tuple[int, ...]:
    """Up to `most` of the calls 0 to `calls - 1`, evenly spaced, first and last included."""
    if calls <= most:
        return tuple(range(calls))
    return tuple(i * (calls - 1) // (most - 1) for i in range(most))
