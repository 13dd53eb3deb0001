"""The arguments that a model is called with first, taken from whoever calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ditq_converters.hooks import by_name, until_reached
from ditq_converters.sites.inputs import NoInputs


def first_call(model: nn.Module, run: Callable[[], Any]) -> dict[str, Any]:
    """Keyword arguments of the first call of a model; `run` ends there, before the model computes.

    Raises:
        NoInputs: `run` does not call it.
    """
    found: dict[str, Any] = {}

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(by_name(module, args, kwargs))
        found.pop("return_dict", None)

    with until_reached([model], take):
        run()
        raise NoInputs(
            f"{type(model).__name__}: was not called, so that no inputs for it are known"
        )
    return found
