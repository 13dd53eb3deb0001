"""What a plan was made for. Torch's own guards compare tensors, in C++: a tenth of a small linear for four of them.

Shape, strides, dtype, device and class of every tensor, whether it requires a gradient; dispatch modes, transforms and
autocast of the tensor's device, by the thread's dispatch keys. All other arguments are compared as they are. Where
tensors stand in memory (whether at a multiple of 16) a launch asks itself: it needs the addresses anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C._dynamo.guards import TensorGuards

Arguments = tuple[Any, ...]
PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


class Signature(NamedTuple):
    """Of a call.

    Attributes:
        places: of its tensors.
        values: its arguments with None in the places of tensors.
        same: compares other tensors to those, as long as the thread's dispatch keys are the same, too.
        layouts: of its tensors, to compare anywhere.
    """

    places: tuple[int, ...]
    values: Arguments
    same: Callable[..., bool]
    layouts: tuple[Any, ...]

    def fits(self, arguments: Arguments) -> bool:
        """Whether other arguments, of the same classes, have it, whoever looks on."""
        values = values_of(arguments, self.places)
        return self.values == values and self.layouts == _layouts_of(arguments, self.places)


def key_of(name: str, arguments: Arguments) -> tuple[Any, ...]:
    """What calls of one signature have in common, and few others: cheap to make."""
    return name, arguments[0].shape, *map(type, arguments)


def signature_of(arguments: Arguments) -> Signature | None:
    """That of a call; None if a tensor is of a class of its own, which may do anything when it is called."""
    places = tuple(i for i, one in enumerate(arguments) if isinstance(one, torch.Tensor))
    tensors = [arguments[i] for i in places]
    if not PLAIN_TENSORS.issuperset(map(type, tensors)):
        return None
    sizes: Any = [list(one.shape) for one in tensors]
    strides: Any = [list(one.stride()) for one in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    # one tensor in two places fits no signature: it need not be one the next time
    values, layouts = values_of(arguments, places), _layouts_of(arguments, places)
    return Signature(places, values, guards.check, layouts)


def values_of(arguments: Arguments, places: tuple[int, ...]) -> Arguments:
    """Arguments with None in the places of tensors."""
    values = list(arguments)
    for i in places:
        values[i] = None
    return tuple(values)


def _layouts_of(arguments: Arguments, places: tuple[int, ...]) -> tuple[Any, ...]:
    tensors = [arguments[i] for i in places]
    return tuple((one.shape, one.stride(), one.dtype, one.device) for one in tensors)


def flat(arguments: Arguments) -> Arguments:
    """Arguments with the members of lists, and None behind them, in their places."""
    if list not in map(type, arguments):
        return arguments
    return tuple([one for a in arguments for one in ((*a, None) if type(a) is list else (a,))])
