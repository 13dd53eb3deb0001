"""Which packed models the demo makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One packed model of the demo.

    Attributes:
        name: as shown.
        method: calibration method.
        weights: `w8` or `w4p`.
        activations: `token` or `static`.
        per_layer: measure the error of every layer too.
    """

    name: str
    method: str
    weights: str
    activations: str
    per_layer: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return self.name.lower().replace(" ", "-")


DIGITS = (
    Variant("W8A8", "smoothquant", "w8", "token", per_layer=True),
    Variant("W4A8", "smoothquant", "w4p", "token", per_layer=True),
)
SALIENT = tuple(
    Variant(f"{bits} {activations} {method}", method, weights, activations)
    for bits, weights in (("W8A8", "w8"), ("W4A8", "w4p"))
    for activations in ("static", "token")
    for method in ("linear", "smoothquant")
)
