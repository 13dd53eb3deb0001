"""Recipe: every choice of a conversion, validated once, stored in the checkpoint as provenance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

from ditq_converters.methods import METHODS

WEIGHTS = ("w8", "w4p")
ACTIVATIONS = ("token", "static")


@dataclass(frozen=True)
class Recipe:
    """How to convert.

    Attributes:
        method: a name in `ditq_converters.methods.METHODS`.
        weights: `w8` (int8 per output channel) or `w4p` (4 bits, two-level groups).
        activations: `token` (a scale per token, computed when it runs) or `static` (calibrated range).
        group_size: input channels per `w4p` group; lowered per layer to a divisor of its inputs.
        modulation: weights of the AdaLN modulation linears (weight-only); None: the same as `weights`.
        keep: glob patterns of module names that stay float.
        alpha: migration strength of smoothing, s = a^alpha / w^(1 - alpha) (SmoothQuant Eq. 4).

    Raises:
        ValueError: a field is out of its range; the message lists the choices.
    """

    method: str = "smoothquant"
    weights: str = "w8"
    activations: str = "token"
    group_size: int = 64
    modulation: str | None = None
    keep: tuple[str, ...] = ()
    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Validate every field."""
        if isinstance(self.keep, str):
            raise ValueError(
                f"recipe: keep must be a tuple of patterns, got the string {self.keep!r}"
            )
        _one_of("method", self.method, tuple(METHODS))
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("activations", self.activations, ACTIVATIONS)
        _one_of("modulation", self.modulation or self.weights, WEIGHTS)
        if self.group_size < 32 or self.group_size % 32:
            raise ValueError(
                f"recipe: group_size must be a positive multiple of 32, got {self.group_size}"
            )
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"recipe: alpha must lie in [0, 1], got {self.alpha}")

    @property
    def needs_statistics(self) -> bool:
        """Whether a calibration must have run."""
        return self.activations == "static" or METHODS[self.method].needs_statistics

    @property
    def modulation_weights(self) -> str:
        """Weights of the modulation linears."""
        return self.modulation or self.weights

    def keeps(self, layer: str) -> bool:
        """Whether a module stays float."""
        return any(fnmatch(layer, pattern) for pattern in self.keep)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, for provenance."""
        return {**asdict(self), "keep": list(self.keep), "modulation": self.modulation_weights}


def _one_of(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"recipe: {field} must be one of {', '.join(choices)}, got {value!r}")
