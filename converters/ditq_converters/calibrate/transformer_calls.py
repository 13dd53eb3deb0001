"""A transformer's call: the timestep in it, and a copy of its arguments that can be kept, stored and made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ditq_converters.hooks import by_name

TIMESTEPS = ("timestep", "timesteps", "t")
TENSOR = "tensor"


@dataclass(frozen=True)
class TransformerCall:
    """One forward.

    Attributes:
        component: which transformer of the pipeline.
        timestep: that it was told; the highest where it was told several.
        args: by position; every tensor on the device it came on, or on the CPU when read from disk.
        kwargs: by name.
    """

    component: str
    timestep: float
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(self, model: nn.Module) -> torch.Tensor:
        """The model's first output for these arguments, on its device; floating arguments in its dtype."""
        place = next(p for p in model.parameters() if not p.is_meta)

        args, kwargs = map_tensors(lambda t: t.to(place.device), (self.args, self.kwargs))
        with torch.no_grad():
            out = model(*args, **kwargs)
        first: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
        return first

    def by_name(self, model: nn.Module) -> dict[str, Any]:
        """All arguments, by the names that the model's forward has for them."""
        return by_name(model, self.args, self.kwargs)


def timestep_of(traced: str | None, arguments: Mapping[str, Any]) -> float:
    """The timestep of a call, in the model's own units; the highest of several, 0 where there is none.

    Args:
        traced: the argument that carries it; where that is not told, or not there, the first of a usual name does.
        arguments: of the call, by name.
    """
    there = (arguments[n] for n in (traced, *TIMESTEPS) if n and arguments.get(n) is not None)
    value = next(there, None)
    return 0.0 if value is None else float(torch.as_tensor(value).float().max())


def map_tensors(change: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """A tree of dictionaries, lists and tuples with every tensor changed."""
    return tree_map_only(torch.Tensor, change, tree)


def to_store(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, list[torch.Tensor]] | None:
    """(JSON, tensors in its order) of a call's arguments; None if they hold something that JSON cannot say."""
    tensors: list[torch.Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return {TENSOR: len(tensors) - 1}
        if isinstance(value, Mapping):
            return {"map": {str(key): plain(item) for key, item in value.items()}}
        if isinstance(value, list | tuple):
            return {"tuple" if isinstance(value, tuple) else "list": [plain(v) for v in value]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        return {"value": value}

    try:
        return json.dumps(plain([args, kwargs])), tensors
    except TypeError:
        return None


def from_store(text: str, tensors: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that `to_store` described."""

    def value_of(plain: dict[str, Any]) -> Any:
        ((kind, content),) = plain.items()
        return READERS[kind](content, tensors, value_of)

    args, kwargs = value_of(json.loads(text))
    return args, kwargs


READERS: dict[str, Callable[[Any, list[torch.Tensor], Callable[[Any], Any]], Any]] = {
    TENSOR: lambda content, tensors, read: tensors[content],
    "map": lambda content, tensors, read: {key: read(item) for key, item in content.items()},
    "list": lambda content, tensors, read: [read(item) for item in content],
    "tuple": lambda content, tensors, read: tuple(read(item) for item in content),
    "dtype": lambda content, tensors, read: getattr(torch, content),
    "value": lambda content, tensors, read: content,
}
