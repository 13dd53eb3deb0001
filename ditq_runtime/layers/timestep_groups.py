"""Which timestep group is now: found on the device, once per block, from the timestep argument (HTG, arXiv:2503.06930).

A grouped layer has one bias per group. The index is per sample, so a batch may mix timesteps; it is a tensor, so
nothing waits for the GPU, nothing recompiles when it changes, and a CUDA graph replays it.
"""

from __future__ import annotations

import torch
from torch import nn

from ditq_runtime.layers.pinned import Pinned


class GroupIndex:
    """Where a block leaves its current group for the layers that read it. A plain object: it has no state to save."""

    value: torch.Tensor

    def rows(self, table: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The rows of a table for the current batch.

        Args:
            table: [G, N].
            num_rows: B * T rows, sample by sample, or B.

        Returns:
            [num_rows, N].
        """
        chosen = table[self.value]  # [B, N]
        return chosen.repeat_interleave(num_rows // chosen.shape[0], dim=0)


class TimestepGroups(Pinned):
    """The boundaries between a block's timestep groups.

    Attributes:
        num_groups: G.
        bounds: fp32 [G - 1], ascending timestep values; group 0 holds the smallest timesteps, t <= bounds[0].
        current: told the index at every forward.
    """

    def __init__(self, num_groups: int, device: torch.device | str = "meta") -> None:
        """Allocate the boundaries of `num_groups` groups, uninitialized."""
        super().__init__()
        self.num_groups = num_groups
        bounds = torch.empty(num_groups - 1, dtype=torch.float32, device=device)
        self.bounds = nn.Parameter(bounds, requires_grad=False)
        self.current = GroupIndex()

    def forward(self, timestep: torch.Tensor) -> None:
        """Note the group of every sample.

        Args:
            timestep: [B], or one value for all samples, in any dtype; outside the calibrated range the nearest
                group is taken.
        """
        values = timestep.reshape(-1).float().contiguous()  # pipelines pass t.expand(B)
        self.current.value = torch.bucketize(values, self.bounds)
