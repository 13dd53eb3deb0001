"""Eager calls without torch's dispatcher: a plan for each signature, checked once.

A signature is what checks and launches look at: shape, strides, dtype, device and alignment of every tensor, and every
other argument as it is. The first call of a signature goes through all checks and makes a plan; the next ones look it
up. A plan is never taken where somebody looks on (`surroundings.plain`) or asks for a gradient: the dispatcher runs
then. `fault_of` holds a kept plan to what would be made now, for reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ditq_kernels.launch import backend
from ditq_kernels.launch.surroundings import plain

LIMIT = 4096  # signatures kept; sizes that never repeat start over
ALIGNMENT = 15  # kernels are compiled for pointers that are multiples of 16, and others
PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})

Arguments = tuple[Any, ...]


class Op(Protocol):
    """What a plan needs of an op."""

    @property
    def name(self) -> str:
        """Such as "gemm_w8a8"."""

    def implementation(self, device: torch.device) -> Callable[..., Any]:
        """What runs on a device."""


class Plan(Protocol):
    """What runs calls of one signature."""

    def __call__(self, arguments: Arguments) -> Any:
        """Run one."""

    def of(self, arguments: Arguments) -> Plan | None:
        """The plan for these tensors, where it depends on more than their signature."""

    def beside(self, before: Plan) -> Plan:
        """What is kept for a signature that had a plan, for other tensors."""


@dataclass(frozen=True)
class FunctionPlan:
    """An implementation that is called as it is: the definition, the CPU backend, a launch that cannot be replayed."""

    op: Op

    def __call__(self, arguments: Arguments) -> Any:
        """Run it."""
        return self.op.implementation(arguments[0].device)(*arguments)

    def of(self, arguments: Arguments) -> FunctionPlan:
        """Itself."""
        return self

    def beside(self, before: Plan) -> Plan:
        """Takes the place of what was kept for the signature."""
        return self


_plans: dict[tuple[Any, ...] | None, Plan] = {}


def kept(name: str, arguments: Arguments) -> Plan | None:
    """The plan of a call that needs no checks; None for the first of a signature, and wherever somebody looks on."""
    if not direct(arguments):
        return None
    found = _plans.get(signature(name, arguments))
    return None if found is None else found.of(arguments)


def direct(arguments: Arguments) -> bool:
    """Whether a call may run without the dispatcher."""
    if not plain() or arguments[0].is_meta:
        return False
    return not torch.is_grad_enabled() or not any(
        isinstance(a, torch.Tensor) and a.requires_grad for a in arguments
    )


def run(op: Op, arguments: Arguments) -> Any:
    """Run a call that was checked, and keep its plan."""
    key = signature(op.name, arguments)
    if key is None:
        return FunctionPlan(op)(arguments)
    result, plan = _made(op, arguments)
    if len(_plans) >= LIMIT:
        _plans.clear()
    before = _plans.get(key)
    _plans[key] = plan if before is None else plan.beside(before)
    return result


def fault_of(op: Op, arguments: Arguments) -> str:
    """What is wrong with the plan that is kept for these arguments; empty if nothing is, or there is none."""
    found = _plans.get(signature(op.name, arguments))
    found = None if found is None else found.of(arguments)
    if found is None:
        return ""
    expected: Plan | None = FunctionPlan(op)
    if backend.backend_of(op.name, arguments[0].device) == "triton":
        _, made = _made(op, arguments)
        expected = made.of(arguments)
    if found == expected:
        return ""
    return f"the plan kept for {op.name} is {found}, which is not what the op runs"


def signature(name: str, arguments: Arguments) -> tuple[Any, ...] | None:
    """The key of a call; None if a tensor is of a class of its own."""
    try:
        return name, *[
            (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() & ALIGNMENT)
            if type(a) in PLAIN_TENSORS
            else None if a is None else _other(a)
            for a in arguments
        ]  # fmt: skip
    except _ClassOfItsOwnError:
        return None


def flat(arguments: Arguments) -> Arguments:
    """Arguments with the members of lists in their places."""
    if list not in map(type, arguments):
        return arguments
    return tuple([one for a in arguments for one in (a if type(a) is list else (a,))])


def clear() -> None:
    """Forget all plans."""
    _plans.clear()


class _ClassOfItsOwnError(Exception):
    """A tensor that may do anything when it is called."""


def _other(value: Any) -> Any:
    if isinstance(value, list):
        return signature("", tuple(value))
    if isinstance(value, torch.Tensor):
        raise _ClassOfItsOwnError
    return value


def _made(op: Op, arguments: Arguments) -> tuple[Any, Plan]:
    """The result of a call, and its plan."""
    device = arguments[0].device
    if backend.backend_of(op.name, device) != "triton":
        plan = FunctionPlan(op)
        return plan(arguments), plan
    from ditq_kernels._triton.parts import repeat  # Triton only where it runs

    return repeat.made(op, arguments)
