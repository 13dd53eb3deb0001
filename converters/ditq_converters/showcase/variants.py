"""Which packed models the demo makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ditq_converters.plan.recipe import Recipe


@dataclass(frozen=True)
class Variant:
    """One packed model of the demo.

    Attributes:
        name: as shown.
        method: calibration method.
        weights: `w8` or `w4p`.
        activations: `token` or `static`.
        gptq: round by error feedback, and take mean errors back through biases.
        per_layer: measure the error of every layer too.
    """

    name: str
    method: str
    weights: str
    activations: str = "token"
    gptq: bool = False
    per_layer: bool = False

    @property
    def recipe(self) -> Recipe:
        """Its choices."""
        more: dict[str, Any] = {"rounding": "gptq", "bias_correction": True} if self.gptq else {}
        return Recipe(self.method, self.weights, self.activations, **more)

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return self.name.lower().replace(" ", "-")


NO_DATA, FED_BACK = "W4A8 data-free", "W4A8 gptq"
DIGITS = (
    Variant("W8A8", "smoothquant", "w8", per_layer=True),
    Variant("W4A8", "smoothquant", "w4p", per_layer=True),
)
FLOW = (
    Variant("W8A8", "smoothquant", "w8"),
    Variant(NO_DATA, "linear", "w4p"),
    Variant(FED_BACK, "smoothquant", "w4p", gptq=True),
)
SALIENT = tuple(
    Variant(f"{bits} {activations} {method}", method, weights, activations)
    for bits, weights in (("W8A8", "w8"), ("W4A8", "w4p"))
    for activations in ("static", "token")
    for method in ("linear", "smoothquant")
)
