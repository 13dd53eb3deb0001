"""What one run of an op's launch does: memory it takes, kernels it starts."""

import threading
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATES = frozenset({"aten::empty", "aten::new_empty", "aten::empty_strided", "aten::empty_like"})

_thread = threading.local()


class Recording(TorchDispatchMode):
    """While entered, notes what this thread's launches do.

    Attributes:
        memory: tensors that were taken, unwritten.
        launches: compiled kernel, grid and arguments, in order.
        other: an operator of torch that is neither memory nor a view: such a run cannot be repeated; "" if none ran.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        super().__init__()
        self.memory: list[torch.Tensor] = []
        self.launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        self.other = ""

    def __enter__(self) -> "Recording":
        """Begin."""
        _thread.active = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)
        _thread.active = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note one operator of torch."""
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ALLOCATES:
            self.memory.append(result)
        elif not func.is_view:
            self.other = func._schema.name
        return result


def active() -> Recording | None:
    """The recording of this thread, if there is one."""
    return getattr(_thread, "active", None)
