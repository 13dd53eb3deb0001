"""What belongs to one forward travels with it: nothing of it stands on modules, which threads share.

One thread-local holds it all: torch 2.13 refuses `ContextVar.set` under fullgraph compilation, and follows a
thread-local whose object is changed, not replaced. `carry` fills it when a model's forward begins and clears it when
that ends, whatever happens in between, so that one thread runs one packed model at a time: a forward of another one
inside of it leaves nothing, and what asks for it then says so.
"""

from __future__ import annotations

import inspect
import threading
from functools import partial
from typing import Any

import torch
from torch import nn

REPLAYS = "replays"  # attribute of what stands for a model's forward and makes again what it once captured


class PerThread(threading.local):
    """A base of objects whose attributes each thread has for itself; a copy starts anew."""

    def __reduce__(self) -> Any:
        """As `copy` and `pickle` make another."""
        return type(self), ()


class Forward:
    """What modules read while a model runs.

    Attributes:
        timestep: [B], [B, L] or one value, as the model was given it; None: not noted.
        index: timestep group of each sample [B], or of each token [B, L], of the block that runs; None: none found.
        hoisted: module -> the modulation [B, N] that was computed for it before the sampling loop.
        watch: the execution report that observes this thread.
    """

    def __init__(self) -> None:
        """Nothing runs yet."""
        self.timestep: torch.Tensor | None = None
        self.index: torch.Tensor | None = None
        self.hoisted: dict[nn.Module, torch.Tensor] | None = None
        self.watch: Any = None


class _Here(PerThread):
    def __init__(self) -> None:
        self.forward = Forward()


_HERE = _Here()


def here() -> Forward:
    """What belongs to the forward that runs in this thread."""
    return _HERE.forward


def carry(model: nn.Module, argument: str) -> None:
    """Let every forward of a model carry its timestep.

    Args:
        model: the transformer.
        argument: name of the argument of its forward that is the timestep.

    Raises:
        ValueError: its forward has no such argument.
    """
    names = list(inspect.signature(type(model).forward).parameters)[1:]  # the first is self
    if argument not in names:
        raise ValueError(f"{type(model).__name__}: its forward takes no {argument!r}")
    begin = partial(_begin, argument, names.index(argument))
    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)


def _begin(
    argument: str, position: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    forward = here()
    forward.index = None
    forward.timestep = kwargs.get(argument)
    if forward.timestep is None and position < len(args):
        forward.timestep = args[position]


def _end(model: nn.Module, args: Any, output: Any) -> None:
    forward = here()
    forward.timestep = forward.index = None
