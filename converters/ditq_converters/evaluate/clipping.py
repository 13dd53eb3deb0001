"""How many activations a static range cuts off: the calibration's blind spot, per layer and sampling step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ditq_runtime.layers.linear import QuantLinear

LOWEST, HIGHEST = -128, 127


class ClipCounter:
    """Forward pre-hooks on every linear with static activations, which count inputs outside the codes' range.

    An input is cut off when zero_point + round((x - shift) * smooth_inv / scale) lies outside [-128, 127].

    Attributes:
        names: of the linears listened to; none where no activation range is static.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the linears; nothing is hooked before `with`."""
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, QuantLinear) and module.format.activations == "static"
        }
        self.names = list(self._layers)
        self._counts = torch.zeros(len(self.names), 2, dtype=torch.float64)  # outside, all
        self._hooks: list[Any] = []

    def __enter__(self) -> ClipCounter:
        """Install the hooks."""
        for row, layer in enumerate(self._layers.values()):
            self._hooks.append(layer.register_forward_pre_hook(self._observer(row)))
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def take(self) -> torch.Tensor:
        """Share of inputs outside, fp64 [layers], since the last call of this method."""
        shares = self._counts[:, 0] / self._counts[:, 1]
        self._counts = torch.zeros_like(self._counts)
        return shares

    def _observer(self, row: int) -> Any:
        def observe(layer: QuantLinear, args: tuple[torch.Tensor, ...]) -> None:
            site = layer.site
            assert site is not None
            x = site.transformed(args[0].detach().reshape(-1, layer.in_features))
            code = (x * (1 / site.act_scale)).round() + site.act_zero
            outside = (code < LOWEST) | (code > HIGHEST)
            self._counts[row] += torch.tensor([float(outside.sum()), outside.numel()]).double()

        return observe
