"""Where arguments of recorded launches come from: the call, memory it took, constants."""

from typing import Any

import torch
from triton import language as tl

from ditq_kernels.launch.recording import Recording

FIXED = (int, float, tl.constexpr, type(None))  # what a kernel may take beside tensors, the same each time


class CannotRepeatError(Exception):
    """A run did more than take memory and launch kernels on the tensors of its call."""


class Pool:
    """All values that launches of a run took, in order: arguments, memory, fixed ones.

    Attributes:
        fixed: sizes, strides, constants, added as they are asked for.
    """

    def __init__(self, given: tuple[Any, ...], recording: Recording) -> None:
        """Of a run on these arguments, without lists.

        Raises:
            CannotRepeatError: it ran operators of torch, or launched nothing.
        """
        if recording.other or not recording.launches:
            raise CannotRepeatError
        self._given, self._memory = given, recording.memory
        self.fixed: list[Any] = []

    def place(self, value: Any) -> Any:
        """The place of an argument of a launch; a tuple of places for a tuple.

        Raises:
            CannotRepeatError: it is none of the above.
        """
        if isinstance(value, torch.Tensor):
            return self._place_of_tensor(value)
        if isinstance(value, tuple) and not _is_fixed(value):
            return tuple(map(self.place, value))
        if not _is_fixed(value):
            raise CannotRepeatError
        self.fixed.append(value)
        return len(self._given) + len(self._memory) + len(self.fixed) - 1

    def _place_of_tensor(self, value: torch.Tensor) -> int:
        """Kernels see pointers only: a tensor is where its first element is."""
        found = [
            i
            for i, one in enumerate((*self._given, *self._memory))
            if isinstance(one, torch.Tensor) and one.data_ptr() == value.data_ptr()
        ]
        if len(found) != 1 or value.numel() == 0:  # two arguments in one place may be two the next time
            raise CannotRepeatError
        return found[0]

    def memory_of(self, result: torch.Tensor) -> tuple[int, tuple[Any, Any, Any]]:
        """Which memory a result is, and how it is seen: shape, strides, offset.

        Raises:
            CannotRepeatError: it is no memory of the run.
        """
        for i, one in enumerate(self._memory):
            same = one.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
            # empty tensors share their address
            if same and one.dtype == result.dtype and (result.numel() or one.shape == result.shape):
                return i, (tuple(result.shape), result.stride(), result.storage_offset())
        raise CannotRepeatError


def _is_fixed(value: Any) -> bool:
    return all(map(_is_fixed, value)) if isinstance(value, tuple) else isinstance(value, FIXED)

