"""Inputs of one forward, where none were given."""

from __future__ import annotations

from typing import Any

from torch import nn

from ditq_runtime.families import family_of


def forward_inputs(model: nn.Module) -> dict[str, Any]:
    """A smallest batch for one forward of a model, as keyword arguments.

    Raises:
        ValueError: it cannot be made from the configuration.
    """
    known = family_of(type(model).__name__).example_inputs
    if known is None:
        raise ValueError(
            f"{type(model).__name__}: its sites are found on one forward, whose inputs cannot be made from its "
            "configuration; pass its keyword arguments as inputs (--inputs FILE)"
        )
    return known(model)
