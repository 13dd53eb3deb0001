"""Launches repeated without Python's part of them: what a launch found out is kept with the compiled kernel.

A launch looks up its tile, binds arguments, computes Triton's cache key and finds the kernel: ten times what the launch
itself costs. For a signature all of this is the same each time, and only pointers differ. So one run is recorded, and
the next ones take memory as it did and hand the same arguments to Triton's launcher, with the pointers of the call.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs

from ditq_kernels._triton.parts.places import Pool
from ditq_kernels.launch.plans import Arguments, FunctionPlan, Op, Plan, flat


class Memory(NamedTuple):
    """Memory that a run takes, unwritten."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def taken(self, device: torch.device) -> torch.Tensor:
        """It, on a device."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


class Step(NamedTuple):
    """One launch: places of its arguments in the pool, which is arguments, memory, weights, fixed; tuples nest."""

    kernel: Any
    grid: tuple[int, int, int]
    places: tuple[Any, ...]


class Out(NamedTuple):
    """A result: memory, or another view of it by shape, strides and offset."""

    memory: int
    view: tuple[Any, Any, int] | None


@dataclass(frozen=True)
class LaunchPlan:
    """The launches of one signature.

    Attributes:
        op: which op.
        device: of all tensors.
        memory: what a run takes.
        weights: what was prepared from tensors of the call, and the names of its tensors; its owner may drop it.
        fixed: sizes, strides and constants.
        steps: launches in order.
        outs: results.
        single: one result, not a tuple.
        nested: arguments have lists.
    """

    op: Op
    device: torch.device
    memory: tuple[Memory, ...]
    weights: tuple[tuple[weakref.ref, tuple[str, ...]], ...] = field(compare=False)
    fixed: tuple[Any, ...]
    steps: tuple[Step, ...]
    outs: tuple[Out, ...]
    single: bool
    nested: bool
    _ready: Any = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Make ready what a call needs."""
        stream_of = triton.runtime.driver.active.get_current_stream
        # memory without elements is not taken again: no public op hands it on
        memory = tuple((*m, None if all(m.shape) else m.taken(self.device)) for m in self.memory)
        weights = tuple((made, attrgetter(*names)) for made, names in self.weights)
        ready = tuple(map(_launcher, self.steps)), memory, weights, stream_of
        object.__setattr__(self, "_ready", ready)

    def __call__(self, arguments: Arguments) -> Any:
        """Run one call of this signature."""
        device = self.device
        if _somebody_listens() or (device.index is not None and not _is_current(device)):
            return FunctionPlan(self.op)(arguments)
        launchers, memory_of, weights, stream_of = self._ready
        memory = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device) if none is None else none
            for shape, stride, dtype, none in memory_of
        ]
        given = flat(arguments) if self.nested else arguments
        if weights:
            pool = (*given, *memory, *[w for made, take in weights for w in take(made())], *self.fixed)
        else:
            pool = (*given, *memory, *self.fixed)
        stream = stream_of(device.index or 0)
        for launch in launchers:
            launch(stream, pool)
        if self.single:
            return _seen(self.outs[0], memory)
        return tuple([_seen(out, memory) for out in self.outs])

    def of(self, arguments: Arguments) -> LaunchPlan | None:
        """Itself, unless the weights that were prepared for it are gone."""
        return self if not self.weights or all([made() for made, _ in self.weights]) else None

    def beside(self, before: Plan) -> Plan:
        """Takes the place of what was kept for the signature."""
        return self


def plan_of(op: Op, arguments: Arguments, recording: Any, result: Any) -> LaunchPlan:
    """What repeats a recorded run.

    Raises:
        CannotRepeatError: it did more than take memory and launch kernels on tensors of the call.
    """
    given = flat(arguments)
    pool = Pool(given, recording)
    steps = tuple(
        Step(kernel, (*grid, 1, 1)[:3], tuple(map(pool.place, values)))
        for kernel, grid, values in recording.launches
    )
    results = result if isinstance(result, tuple) else (result,)
    memory = [
        Memory(tuple(m.shape), m.stride(), m.dtype) for m in recording.memory
    ]
    outs = []
    for at, seen in map(pool.memory_of, results):
        shape, stride, offset = seen
        whole = offset == 0 and math.prod(shape) == math.prod(memory[at].shape)
        if whole:  # taken as it is seen, which is one operator less
            memory[at] = memory[at]._replace(shape=shape, stride=stride)
        outs.append(Out(at, None if whole else seen))
    weights = tuple((weakref.ref(one), names) for one, names in pool.prepared)
    nested, single = given is not arguments, not isinstance(result, tuple)
    return LaunchPlan(
        op, given[0].device, tuple(memory), weights, tuple(pool.fixed), steps, tuple(outs), single, nested
    )  # fmt: skip


def _launcher(step: Step) -> Callable[[int, tuple[Any, ...]], None]:
    """What launches a step on a stream with a pool.

    Written as an expression, since taking forty values out of a tuple one by one costs a launch: only numbers get in.
    """
    kernel = step.kernel
    names = {"run": kernel.run, "function": kernel.function, "metadata": kernel.packed_metadata}
    x, y, z = step.grid
    arguments = ", ".join(map(_expression, step.places))
    call = f"run({x}, {y}, {z}, stream, function, metadata, None, None, None, {arguments})"
    return eval(f"lambda stream, pool: {call}", names)


def _expression(place: Any) -> str:
    if isinstance(place, tuple):
        return "(" + "".join(f"{_expression(one)}, " for one in place) + ")"
    return f"pool[{place:d}]"


def _seen(out: Out, memory: list[torch.Tensor]) -> torch.Tensor:
    return memory[out.memory] if out.view is None else memory[out.memory].as_strided(*out.view)


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or torch._C._cuda_getDevice() == device.index


def _somebody_listens() -> bool:
    """A profiler of Triton has hooks on launches: it gets them from Triton's own way to launch."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))
