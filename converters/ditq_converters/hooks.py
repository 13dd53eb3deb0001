"""Hooks that are there inside a block, what they are given, and runs that end where a module is reached."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Reached(Exception):
    """The module that a run was for has been reached."""


def hooked(handles: Iterable[RemovableHandle]) -> ExitStack:
    """A block at whose end these hooks are removed."""
    stack = ExitStack()
    for handle in handles:
        stack.enter_context(handle)
    return stack


@contextmanager
def until_reached(
    modules: Iterable[nn.Module],
    take: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
) -> Iterator[None]:
    """A block that ends when one of the modules is called; `take` gets module, args and kwargs of that call."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(module, args, kwargs)
        raise Reached

    handles = (m.register_forward_pre_hook(stop, with_kwargs=True) for m in modules)
    with suppress(Reached), hooked(handles):
        yield


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call, by the names that the model's forward has for them."""
    bound = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs)
    return dict(list(bound.arguments.items())[1:])  # the first is self
