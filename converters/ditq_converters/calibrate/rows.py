"""Which input rows a calibration keeps for searches: those of the lowest keys, which seed, input, call and row decide.

So the choice is the same for every site of a call that has as many rows, and for any split of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ditq_runtime.calls.seeds import row_keys

ROW_CALLS = 50  # rows are read of this many timesteps at most
STORED = (torch.float32, torch.bfloat16, torch.float16)  # row dtypes; any other is stored as fp32


@dataclass(frozen=True)
class Kept:
    """Rows with the lowest keys so far, by rising key.

    Attributes:
        keys: int64 [n].
        rows: [n, K], fp32, bf16 or fp16, on the CPU.
    """

    keys: torch.Tensor
    rows: torch.Tensor

    def joined(self, other: Kept, count: int) -> Kept:
        """The lowest `count` of both."""
        keys = torch.cat([self.keys, other.keys])
        order = keys.sort(stable=True).indices[:count]
        return Kept(keys[order], torch.cat([self.rows, other.rows])[order])


class RowChoice:
    """The rows of one input, call by call."""

    def __init__(self, count: int, seed: int, given: int) -> None:
        """Keep `count` rows per site and timestep of input number `given`."""
        self.count, self.given, self._seed = count, given, seed
        self._call, self._lowest = -1, dict[int, tuple[torch.Tensor, torch.Tensor]]()

    def of(self, flat: torch.Tensor, call: int) -> Kept:
        """The chosen rows of [R, K], the input of a linear at call number `call`."""
        if call != self._call:
            self._call, self._lowest = call, {}
        if len(flat) not in self._lowest:
            every = row_keys(self._seed, self.given, call, len(flat))
            order = np.argsort(every, kind="stable")[: self.count]
            self._lowest[len(flat)] = torch.from_numpy(every[order]), torch.from_numpy(order)
        keys, rows = self._lowest[len(flat)]
        kept = flat[rows.to(flat.device)].cpu()
        return Kept(keys.clone(), kept if kept.dtype in STORED else kept.float())


def evenly_spaced(calls: int, most: int = ROW_CALLS) -> tuple[int, ...]:
    """Up to `most` of the calls 0 to `calls - 1`, evenly spaced, first and last included."""
    if calls <= most:
        return tuple(range(calls))
    return tuple(i * (calls - 1) // (most - 1) for i in range(most))
