"""SimulatedLinear: a linear whose operands are rounded and multiplied in float. It is no packed layer."""

from __future__ import annotations

import torch
from torch import nn

from ditq_bench.simulated.granularity import FoldedWeight
from ditq_bench.simulated.rounding import RULES, asymmetric_codes

Range = tuple[torch.Tensor, torch.Tensor]


class Groups:
    """Where a block of a simulation finds the timestep group of every sample. One thread runs it.

    Attributes:
        value: int64 [B].
    """

    value: torch.Tensor


class SimulatedLinear(nn.Module):
    """Y = Q((X - z_g) / s) W_hat^T + b_g, in the dtype of X.

    Attributes:
        weight: [N, K] the rounded weight with its smoothing factor (and branch) in it; or a `FoldedWeight`.
    """

    def __init__(
        self,
        weight: torch.Tensor | FoldedWeight,
        bias: torch.Tensor | None,
        smooth: torch.Tensor | None,
        shift: torch.Tensor | None,
        act_rule: str,
        act_bits: int,
        act_range: Range | None,
        group: Groups,
    ) -> None:
        """Keep the parts.

        Args:
            weight: what X - z, smoothed, is multiplied by.
            bias: [G, N] or [1, N]; None for none.
            smooth: [K] s; None for 1.
            shift: [G, K] or [1, K] z; None for 0.
            act_rule: a name of `rounding.RULES`.
            act_bits: of an activation.
            act_range: low and high, after shift and smoothing; None: those of every input anew.
            group: tells the timestep group of every sample of the batch.
        """
        super().__init__()
        self.weight, self.bias, self.smooth, self.shift = weight, bias, smooth, shift
        self.act_rule, self.act_bits, self.act_range, self.group = (
            act_rule, act_bits, act_range, group,
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, ..., K] -> [B, ..., N]."""
        dtype, x = x.dtype, x.double()
        if self.shift is not None:
            x = x - self._of_sample(self.shift, x)
        if self.smooth is not None:
            x = x / self.smooth
        low, high = (x.min(), x.max()) if self.act_range is None else self.act_range
        if isinstance(self.weight, FoldedWeight):
            y = self._folded(x * self.weight.scale)
        else:
            y = RULES[self.act_rule](x, low, high, self.act_bits) @ self.weight.T
        if self.bias is not None:
            y = y + self._of_sample(self.bias, y)
        return y.to(dtype)

    def _folded(self, x: torch.Tensor) -> torch.Tensor:
        """The scale of every weight column sits in x, which gets a range of its own."""
        assert isinstance(self.weight, FoldedWeight)
        codes, zero, scale = asymmetric_codes(x, x.min(), x.max(), self.act_bits)
        product = self.weight.product((codes - zero).flatten(0, -2))
        return product.unflatten(0, x.shape[:-1]) * scale

    def _of_sample(self, table: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[G, C] -> the rows of the current batch, [B, 1, ..., C]; [1, C] serves all."""
        if len(table) == 1:
            return table[0]
        return table[self.group.value].view(len(like), *(1,) * (like.dim() - 2), -1)
