"""Linears of the float model that compute what their packed form will, in the float model's own units.

A packed linear reads an input that its producer has shifted and scaled, and may itself write rows that were scaled for
its consumer. Put into the float model, which knows nothing of that, it has to undo both: this is the packed layer with
its true integers between the two changes of units. So a model whose linears are exchanged one by one shows to the next
linear what the packed model will.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ditq_converters.convert.fold import Units
from ditq_converters.methods import Transform
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.site import Site

QUANTIZERS = ("act_scale", "act_zero")  # what a quantizer reads behind the transform


def playable(
    in_features: int,
    out_features: int,
    layer_format: LayerFormat,
    stored: dict[str, torch.Tensor],
    quantizer: dict[str, torch.Tensor],
) -> QuantLinear:
    """A packed linear that reads transformed rows: with its quantizer, without its transform.

    Args:
        in_features: K.
        out_features: N.
        layer_format: with one timestep group.
        stored: its tensors.
        quantizer: those of its site; only what quantizes is read.
    """
    layer = QuantLinear(in_features, out_features, layer_format)
    layer.load_state_dict(stored, assign=True)
    if layer_format.integer_gemm:
        site = Site(in_features, SiteFormat(("linear",), layer_format.activations))
        kept = {name: tensor for name, tensor in quantizer.items() if name in QUANTIZERS}
        site.load_state_dict(kept, assign=True)
        layer.read(site)
    return layer


@dataclass(frozen=True)
class Rounded:
    """A linear after rounding.

    Attributes:
        layer_format: of the packed linear.
        stored: its tensors.
        quantizer: those of the site that it reads; empty where it reads none.
    """

    layer_format: LayerFormat
    stored: dict[str, torch.Tensor]
    quantizer: dict[str, torch.Tensor]


class Emulated(nn.Module):
    """A packed linear in the place of the float one.

    Attributes:
        layer: the packed linear.
        site: its quantizer; None: it has none.
    """

    u: torch.Tensor | None
    z: torch.Tensor | None
    scale: torch.Tensor | None
    added: torch.Tensor | None

    def __init__(self, layer: QuantLinear, transform: Transform, units: Units | None) -> None:
        """Remember what to undo.

        Args:
            layer: of `playable`.
            transform: of its input; one shift.
            units: of its output; None: the float model's.
        """
        super().__init__()
        self.layer, self.site = layer, layer.site  # a submodule here, so that it moves along
        self.in_features, self.out_features = layer.in_features, layer.out_features
        smooth, shift = transform.smooth, transform.shift
        self.register_buffer("u", None if smooth is None else (1 / smooth).float())
        self.register_buffer("z", None if shift is None else shift[0].float())
        self.register_buffer("scale", None if units is None else units.scale.float())
        self.register_buffer("added", None if units is None else units.added[0].float())

    def transformed(self, x: torch.Tensor) -> torch.Tensor:
        """Its input as the packed linear reads it: fp32, the shape of x."""
        rows = x.float() if self.z is None else x.float() - self.z
        return rows if self.u is None else rows * self.u

    def in_float_units(self, y: torch.Tensor) -> torch.Tensor:
        """The packed linear's output as the float model's."""
        if self.scale is None or self.added is None:
            return y
        return y / self.scale - self.added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] to [..., N], in the dtype of x; a gradient passes as if nothing were rounded."""
        with torch.no_grad():
            y = self.in_float_units(self.layer(self.transformed(x))).to(x.dtype)
        if not (torch.is_grad_enabled() and x.requires_grad and self.site is not None):
            return y
        straight = nn.functional.linear(self.transformed(x), self.layer.dequantized_weight())
        straight = self.in_float_units(straight).to(x.dtype)
        return y + (straight - straight.detach())
