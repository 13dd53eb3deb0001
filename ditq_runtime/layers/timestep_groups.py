"""Which timestep group is now: found on the device, once per block, from the timestep argument (HTG, arXiv:2503.06930).

A grouped layer has one bias per group. The index is per sample, so a batch may mix timesteps, or per token where the
model is given a timestep for each; it is a tensor, so nothing waits for the GPU, nothing recompiles when it changes,
and a CUDA graph replays it.
"""

from __future__ import annotations

import torch
from torch import nn

from ditq_runtime.layers.carrier import here
from ditq_runtime.layers.pinned import Pinned


class TimestepGroups(Pinned):
    """The boundaries between a block's timestep groups.

    Attributes:
        num_groups: G.
        bounds: fp32 [G - 1], ascending timestep values; group 0 holds the smallest timesteps, t <= bounds[0].
    """

    def __init__(self, num_groups: int, device: torch.device | str = "meta") -> None:
        """Allocate the boundaries of `num_groups` groups, uninitialized."""
        super().__init__()
        self.num_groups = num_groups
        bounds = torch.empty(num_groups - 1, dtype=torch.float32, device=device)
        self.bounds = nn.Parameter(bounds, requires_grad=False)

    def forward(self, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """Find the groups, and leave them for the layers of the block.

        Args:
            timestep: [B], one for each token [B, L], or one value for all samples, in any dtype; outside the calibrated
                range the nearest group is taken. None: what the model was given.

        Returns:
            int64 [B], [B, L] or [1].

        Raises:
            ValueError: the model was given none.
        """
        given = here().timestep if timestep is None else timestep
        if given is None:
            raise ValueError(
                "timestep groups: no timestep reached the block; call the model, with its timestep, and no other "
                "packed model inside of its forward"
            )
        if given.dim() == 1 and given.stride(0) == 0:
            given = given[
                :1
            ]  # pipelines pass t.expand(B): one for all, also where a processor splits the batch
        values = given.float()
        if values.dim() != 2 or values.shape[1] == 1:
            values = values.reshape(-1)
        index = torch.bucketize(values.contiguous(), self.bounds)
        here().index = index
        return index


def group_index(num_rows: int) -> torch.Tensor:
    """The timestep group of each sample of the block that runs, int64 [B], or of each of its rows, [B * L].

    Args:
        num_rows: T, of what the caller works on.

    Raises:
        ValueError: no group was found in this forward, or groups per token for other tokens than these.
    """
    index = here().index
    if index is None:
        raise ValueError(
            "timestep groups: a layer with groups ran outside of a forward of its model; call the model"
        )
    if index.dim() == 1:
        if not len(index) or num_rows % len(index):
            raise ValueError(
                f"timestep groups: {num_rows} rows are no equal share of {len(index)} samples; something splits the "
                "batch inside of the model, as perturbed attention does: pass timestep as t.expand(B), as pipelines "
                "do, or convert without timestep groups"
            )
        return index
    if index.numel() != num_rows:
        raise ValueError(
            f"timestep groups: the model was given a timestep for each of {list(index.shape)} tokens, and this layer "
            f"reads {num_rows} rows; give one timestep a sample, or convert without timestep groups"
        )
    return index.reshape(-1)


def of_groups(table: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The rows of a table for the batch of the block that runs.

    Args:
        table: [G, N].
        num_rows: B * T rows, sample by sample, or B.

    Returns:
        [num_rows, N].
    """
    chosen = table[group_index(num_rows)]  # [B, N]
    return chosen.repeat_interleave(num_rows // chosen.shape[0], dim=0)
