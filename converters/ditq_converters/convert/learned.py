"""A packed linear while its rounding is learned: every code is one of two neighbours, and may lie between them.

AdaRound (Nagel et al., arXiv:2004.10568): code = low + h(v), h = clip(1.2 sigmoid(v) - 0.1, 0, 1); v is learned, and h
is driven to 0 or 1. We depart from it in the two neighbours: they are the code that rounding found before and the one
beside it on the side of what it should stand for, so that learning goes on from any rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import ditq_kernels as k
from ditq_converters.convert.emulated import Emulated
from ditq_kernels.codes.packing import unpack_int4
from ditq_runtime.format.stored_weight import QuantizedWeight

STRETCH = 0.1  # h reaches beyond 0 and 1 by this much before it is clipped
LEAN = 0.1  # of the way from its code to what it should stand for, each weight starts
LEAST = 0.01  # h starts at least so far from 0 and 1, where its slope ends


@dataclass(frozen=True)
class Grid:
    """A quantized weight as real = base + step * code; all [N, K] fp32.

    Attributes:
        code: the codes it has.
        step: what one code more adds.
        base: what code 0 stands for.
        lowest: least code.
        highest: greatest code.
    """

    code: torch.Tensor
    step: torch.Tensor
    base: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Grid:
        """The grid of a quantized weight."""
        if isinstance(weight, k.W8):
            step = weight.scale[:, None].expand(weight.qweight.shape)
            return cls(weight.qweight.float(), step, *_alike(step, 0.0, -127.0, 127.0))
        code = unpack_int4(weight.packed).float()
        if isinstance(weight, k.W4G):
            step, zero = (_wide(part, code) for part in (weight.scale, weight.weight_zero))
            return cls(code, step, -step * zero, *_alike(step, 0.0, 15.0))
        units, offset = (_wide(part, code) for part in (weight.group_scale, weight.group_offset))
        lowest = ((-127 - offset) / units).ceil().clamp(min=0)
        highest = ((127 - offset) / units).floor().clamp(max=15)
        scale = weight.scale[:, None]
        return cls(code, scale * units, scale * offset, lowest, highest)

    def neighbours(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The lower of each code and its neighbour towards the target, and where the target lies between them.

        Args:
            target: [N, K] float.

        Returns:
            low: [N, K]; low + 1 is a code too, unless the grid has but one. place: [N, K] in 0..1 above low.
        """
        wanted = (target.to(self.base) - self.base) / self.step
        low = torch.where(wanted < self.code, self.code - 1, self.code)
        low = low.minimum(self.highest - 1).maximum(self.lowest)
        return low, (wanted - low).clamp(0, 1)


class Learned(nn.Module):
    """A stand-in for a packed linear (`Emulated`) whose codes, bias and static step are learned.

    Attributes:
        v: [N, K], where each code lies between its neighbours.
        bias: [N], or None.
        log_step: [1], of static activations, shared among the readers of a site; or None.
    """

    def __init__(
        self, before: Emulated, target: torch.Tensor, log_step: nn.Parameter | None
    ) -> None:
        """Start at the codes that rounding found.

        Args:
            before: the linear as it was rounded.
            target: [N, K], what its codes should stand for.
            log_step: logarithm of the step of static activations.
        """
        super().__init__()
        self.before = before
        layer = before.layer
        grid = Grid.of(layer.packed())
        self._step, self._base, self._highest = grid.step, grid.base, grid.highest
        self._low, place = grid.neighbours(target)
        found = grid.code - self._low
        start = (found + LEAN * (place - found)).clamp(LEAST, 1 - LEAST)
        self.v = nn.Parameter(torch.logit((start + STRETCH) / (1 + 2 * STRETCH)))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.log_step = log_step

    @property
    def between(self) -> torch.Tensor:
        """H [N, K] in 0..1."""
        return ((1 + 2 * STRETCH) * torch.sigmoid(self.v) - STRETCH).clamp(0, 1)

    @torch.no_grad()
    def codes(self) -> torch.Tensor:
        """[N, K] fp32: of the two neighbours the nearer."""
        return torch.minimum(self._low + (self.between >= 0.5), self._highest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N], as `Emulated`, in float."""
        before, layer = self.before, self.before.layer
        rows = self._quantized(before.transformed(x))
        code = torch.minimum(self._low + self.between, self._highest)
        y = nn.functional.linear(rows, self._base + self._step * code, self.bias)
        if layer.format.lora_rank:
            y = y + rows @ layer.lora_down.float().T @ layer.lora_up.float().T
        return before.in_float_units(y).to(x.dtype)

    def _quantized(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as the quantizer leaves them; gradients pass through the rounding."""
        site = self.before.layer.site
        assert site is not None
        if self.log_step is None:
            with torch.no_grad():
                codes = site(rows.reshape(-1, rows.shape[-1]))
                q = codes.q.float()
                q = q if codes.zero_point is None else q - codes.zero_point[:, None]
                error = (q * codes.scale[:, None]).reshape(rows.shape) - rows
            return rows + error
        step, zero = self.log_step.exp(), site.act_zero
        units = rows / step
        code = units + (units.round() - units).detach()
        return torch.maximum(torch.minimum(code, 127.0 - zero), -128.0 - zero) * step


def _wide(part: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """[N, J] to [N, K], a value per group to one per code."""
    return part.float().repeat_interleave(code.shape[1] // part.shape[1], dim=1)


def _alike(like: torch.Tensor, *values: float) -> list[torch.Tensor]:
    return [torch.full_like(like, value) for value in values]
