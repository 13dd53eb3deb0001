"""A memory budget: whether one input fits, and how many classes fit into one, estimated from a step of one.

peak = what the process holds after that step
     + the largest module's weights, of a model whose weights are read as it runs
     + SLACK, on the CPU
     + statistics: what a run holds before they go to a file (SPILL) and those of one timestep, each twice, as tensors
       and as bytes
     + MARGIN * the most tensor bytes that were alive at once in that step, per sample

On a GPU its memory is meant: what the process has allocated there, those weights, and the last line.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ditq_converters.memory import SLACK, format_bytes, held
from ditq_converters.streaming.model import passing_bytes

SPILL = 4 * 2**20  # bytes of statistics that a run holds before they go to a file
MARGIN = 2.25  # work space of the GEMMs and holes between allocations, over the live tensors; measured up to 2


@dataclass(frozen=True)
class Needs:
    """What a run needs, in bytes.

    Attributes:
        base: whatever its inputs are.
        step: beside that, one step of the input that was tried.
    """

    base: int
    step: int

    def fitting(self, budget: int, wanted: int) -> int:
        """How many such inputs in one, up to `wanted`; ValueError, which says what would do, if not even one."""
        fits = min((budget - self.base) // self.step, wanted)
        if fits < 1:
            raise ValueError(
                f"calibrate: a memory budget of {format_bytes(budget)} is too small: {format_bytes(self.base)} are "
                f"needed whatever is drawn and {format_bytes(self.step)} for a step of the first input; "
                f"allow at least {format_bytes(1.01 * (self.base + self.step))}"
            )
        return int(fits)


def needs(models: Iterable[nn.Module], run: Callable[[], None], widths: int) -> Needs:
    """What calibration needs.

    Args:
        models: the transformers, on their devices.
        run: makes one step of the smallest input.
        widths: bytes of the statistics of one timestep.
    """
    every = list(models)
    with torch.no_grad(), LiveBytes() as live:
        run()
    place = next(p for p in every[0].parameters() if not p.is_meta).device
    kept = 0 if place.type == "cuda" else SLACK + 2 * (SPILL + widths)
    base = held(place) + kept + max(passing_bytes(model) for model in every)
    return Needs(base, int(MARGIN * live.peak))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside the block make and that are still alive; meta has none.

    Attributes:
        peak: the most at any time.
    """

    def __init__(self) -> None:
        """Nothing counted yet."""
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and count what it made; a view of an input makes nothing."""
        out = func(*args, **(kwargs or {}))
        given = {_storage(x) for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for made in tree_iter(out):
            if isinstance(made, torch.Tensor) and not made.is_meta and _storage(made) not in given:
                self._count(made.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, sum(self._alive.values()))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
