"""The arguments that a model is called with first, taken from whoever calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ditq_converters.hooks import until_reached
from ditq_converters.sites.inputs import NoInputs


def first_call(model: nn.Module, run: Callable[[], Any]) -> dict[str, Any]:
    """Keyword arguments of the first call of a model; `run` ends there, before the model computes.

    Raises:
        NoInputs: `run` does not call it.
    """
    found: dict[str, Any] = {}

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        for name, value in list(bound.arguments.items())[1:]:  # the first is self
            if name != "return_dict":
                found[name] = value

    with until_reached([model], take):
        run()
        raise NoInputs(
            f"{type(model).__name__}: was not called, so that no inputs for it are known"
        )
    return found
