"""A block's own share of a modulation that all blocks compute together (PixArt's adaLN-single), with its fold."""

from __future__ import annotations

import torch
from torch import nn

from ditq_runtime.layers.pinned import Pinned
from ditq_runtime.layers.timestep_groups import of_groups


class ModulationTable(Pinned):
    """Emits u * (shared + table + 1) on the rows of a scale, u * (shared + table - z) on those of a shift.

    The shared projection cannot carry a factor of its own for every block, so the block applies it to the vector.

    Attributes:
        weight: fp32 [N], the factor u; 1 on the rows of gates.
        bias: fp32 [N], or [G, N] with timestep groups: u * (table + 1), u * (table - z), or the table itself.
    """

    def __init__(self, num_rows: int, groups: int = 1, device: torch.device | str = "meta") -> None:
        """Allocate for N = `num_rows`, uninitialized."""
        super().__init__()
        shape = (num_rows,) if groups == 1 else (groups, num_rows)
        self.weight = nn.Parameter(torch.empty(num_rows, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(shape, device=device), requires_grad=False)

    def forward(self, shared: torch.Tensor) -> torch.Tensor:
        """Add the block's table to the shared modulation.

        Args:
            shared: [B, N] any float dtype.

        Returns:
            [B, N] fp32 (fp64 for fp64 input).
        """
        bias: torch.Tensor = self.bias
        if bias.dim() == 2:
            bias = of_groups(bias, shared.shape[0])
        return shared.to(torch.promote_types(shared.dtype, torch.float32)) * self.weight + bias
