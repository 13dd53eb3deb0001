"""Launches repeated without Python's part of them: what a launch found out is kept with the compiled kernel.

A launch looks up its tile, binds arguments, computes Triton's cache key and finds the kernel: ten times what the launch
itself costs. For a signature all of this is the same each time, and only addresses differ. So one run is recorded, and
the next ones take memory as it did and hand the same arguments to Triton's launcher, with the addresses of the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ditq_kernels._triton.parts.places import CannotRepeatError, Pool
from ditq_kernels._triton.parts.written import runner_of
from ditq_kernels.launch.plans import FunctionPlan, Op, Plan
from ditq_kernels.launch.recording import Recording
from ditq_kernels.launch.signature import Arguments, flat

ALIGNMENT = 15  # kernels are compiled for addresses that are multiples of 16, and others


class Memory(NamedTuple):
    """Memory that a run takes, unwritten."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Step(NamedTuple):
    """One launch: places of its arguments in the pool, which is arguments, memory, fixed; tuples nest."""

    kernel: Any
    grid: tuple[int, ...]
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
        count: arguments.
        aligned: place of each tensor in the arguments -> whether it stands at a multiple of 16.
        memory: what a run takes.
        fixed: sizes, strides and constants.
        steps: launches in order.
        outs: results.
        single: one result, not several.
    """

    op: Op
    device: torch.device
    count: int
    aligned: dict[int, bool]
    memory: tuple[Memory, ...]
    fixed: tuple[Any, ...]
    steps: tuple[Step, ...]
    outs: tuple[Out, ...]
    single: bool

    def runner(self) -> Callable[[Arguments, tuple[torch.Tensor, ...]], Any]:
        """Launch on the tensors of a call; None where they stand at other multiples."""
        return runner_of(self)


def made(op: Op, arguments: Arguments) -> tuple[Any, Plan]:
    """The result of a call on the kernel of an op, and what repeats it."""
    with Recording() as recording:
        result = op.implementation(arguments[0].device)(*arguments)
    try:
        return result, plan_of(op, arguments, recording, result)
    except CannotRepeatError:
        return result, FunctionPlan(op)


def plan_of(op: Op, arguments: Arguments, recording: Recording, result: Any) -> LaunchPlan:
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
    results = (result,) if isinstance(result, torch.Tensor) else result
    memory = [Memory(tuple(m.shape), m.stride(), m.dtype) for m in recording.memory]
    outs = []
    for at, seen in map(pool.memory_of, results):
        shape, stride, offset = seen
        whole = offset == 0 and math.prod(shape) == math.prod(memory[at].shape)
        if whole:  # taken as it is seen, which is one operator less
            memory[at] = memory[at]._replace(shape=shape, stride=stride)
        outs.append(Out(at, None if whole else seen))
    aligned = {
        i: not one.data_ptr() & ALIGNMENT
        for i, one in enumerate(given)
        if isinstance(one, torch.Tensor)
    }
    return LaunchPlan(
        op, given[0].device, len(given), aligned, tuple(memory), tuple(pool.fixed), steps, tuple(outs),
        isinstance(result, torch.Tensor),
    )  # fmt: skip
