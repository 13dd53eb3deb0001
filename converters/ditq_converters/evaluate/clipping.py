"""How many activations a static range cuts off: the calibration's blind spot, per layer and sampling step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.schedule import schedule_of
from ditq_converters.calibrate.transformer_calls import timestep_of
from ditq_converters.hooks import by_name
from ditq_converters.sites.find import timestep_carrier
from ditq_runtime.layers.linear import QuantLinear

LOWEST, HIGHEST = -128, 127
TRANSFORMER = "transformer"


class ClipCounter:
    """Forward pre-hooks on every linear with static activations, which count inputs outside the codes' range.

    An input is cut off when zero_point + round((x - shift) * smooth_inv / scale) lies outside [-128, 127].

    Attributes:
        names: of the linears listened to; none where no activation range is static.
        counted: per call, its timestep and fp64 [layers, 2]: inputs outside, and all.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        """Find the linears of all transformers; nothing is hooked before `with`."""
        self._models = models
        self._layers = {
            name if component == TRANSFORMER else f"{component}.{name}": module
            for component, model in models.items()
            for name, module in model.named_modules()
            if isinstance(module, QuantLinear) and module.format.activations == "static"
        }
        self.names = list(self._layers)
        self.counted: list[tuple[float, torch.Tensor]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> ClipCounter:
        """Install the hooks."""
        for model in self._models.values():
            begin = model.register_forward_pre_hook(self._begin, with_kwargs=True)
            self._hooks.enter_context(begin)
        for row, layer in enumerate(self._layers.values()):
            self._hooks.enter_context(layer.register_forward_pre_hook(self._observer(row)))
        return self

    def __exit__(self, *error: Any) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = by_name(model, args, kwargs)
        now = timestep_of(timestep_carrier(model, given), given)
        self.counted.append((now, torch.zeros(len(self.names), 2, dtype=torch.float64)))

    def _observer(self, row: int) -> Any:
        def observe(layer: QuantLinear, args: tuple[torch.Tensor, ...]) -> None:
            site = layer.site
            assert site is not None
            x = site.transformed(args[0].detach().reshape(-1, layer.in_features))
            code = (x * (1 / site.act_scale)).round() + site.act_zero
            outside = (code < LOWEST) | (code > HIGHEST)
            counts = torch.tensor([float(outside.sum()), outside.numel()], dtype=torch.float64)
            self.counted[-1][1][row] += counts

        return observe


def shares(counted: Sequence[tuple[float, torch.Tensor]], layers: int) -> torch.Tensor:
    """Share of inputs outside, fp64 [layers, T], noisiest timestep first, of what a `ClipCounter` counted."""
    schedule = schedule_of([[timestep for timestep, _ in counted]])
    counts = torch.zeros(len(schedule.timesteps), layers, 2, dtype=torch.float64)
    for timestep, found in counted:
        counts[schedule.bin_of[timestep]] += found
    return (counts[..., 0] / counts[..., 1]).T.contiguous()
