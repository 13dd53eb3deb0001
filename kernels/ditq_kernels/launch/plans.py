"""Eager calls without torch's dispatcher: a plan for each signature, checked once.

A signature is what checks and launches look at, see `signature`. The first call of one goes through all checks and
makes a plan; the next ones find it. A plan is never taken where somebody looks on (`surroundings.plain`) or asks for a
gradient: the dispatcher runs then. `fault_of` holds a kept plan to what would be made now, for reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch

from ditq_kernels.launch import backend
from ditq_kernels.launch.signature import Arguments, Signature, flat, key_of, signature_of
from ditq_kernels.launch.surroundings import plain

LIMIT = 4096  # signatures kept; sizes that never repeat start over
ALIKE = 32  # of one key


class Op(Protocol):
    """What a plan needs of an op."""

    @property
    def name(self) -> str:
        """Such as "gemm_w8a8"."""

    def implementation(self, device: torch.device) -> Callable[..., Any]:
        """What runs on a device."""


class Plan(Protocol):
    """What runs calls of one signature."""

    def runner(self) -> Callable[[Arguments, tuple[torch.Tensor, ...]], Any]:
        """A function of a call's arguments and its tensors in order; its result is None where it does not serve."""


@dataclass(frozen=True)
class FunctionPlan:
    """An implementation that is called as it is: the definition, the CPU backend, a launch that cannot be replayed."""

    op: Op

    def __call__(self, arguments: Arguments) -> Any:
        """Run it."""
        return self.op.implementation(arguments[0].device)(*arguments)

    def runner(self) -> Callable[[Arguments, tuple[torch.Tensor, ...]], Any]:
        """As it is."""
        return lambda arguments, tensors: self(arguments)


class Kept(NamedTuple):
    """A plan and whom it serves, taken apart for calls.

    Attributes:
        same: compares tensors with those of its signature.
        tensors: takes them out of the arguments.
        others: takes out the rest.
        values: what that must be.
        run: of the plan.
        trains: a tensor asks for a gradient, where gradients are made.
        signature: all of it.
        plan: what made it.
    """

    same: Callable[..., bool]
    tensors: Callable[[Arguments], tuple[torch.Tensor, ...]]
    others: Callable[[Arguments], Arguments]
    values: Arguments
    run: Callable[[Arguments, tuple[torch.Tensor, ...]], Any]
    trains: bool
    signature: Signature
    plan: Plan


_plans: dict[tuple[Any, ...], list[Kept]] = {}


def kept(name: str, arguments: Arguments, given: Arguments) -> Any:
    """The result of a call by its plan; None for the first of a signature, and wherever somebody looks on.

    Args:
        name: of the op.
        arguments: of its implementation.
        given: the same, flat.
    """
    if not plain():
        return None
    for same, tensors_of, others_of, values, run, trains, _, _ in _plans.get(
        key_of(name, given), ()
    ):
        tensors = tensors_of(given)
        if not same(*tensors) or others_of(given) != values:
            continue
        if not trains or not torch.is_grad_enabled():
            made = run(arguments, tensors)
            if made is not None:
                return made
    return None


def direct(arguments: Arguments) -> bool:
    """Whether a call may run without the dispatcher."""
    if not plain() or arguments[0].is_meta:
        return False
    return not torch.is_grad_enabled() or not any(
        isinstance(a, torch.Tensor) and a.requires_grad for a in flat(arguments)
    )


def run(op: Op, arguments: Arguments) -> Any:
    """Run a call that was checked, and keep its plan."""
    given = flat(arguments)
    signature = signature_of(given)
    if signature is None:
        return FunctionPlan(op)(arguments)
    result, plan = _made(op, arguments)
    if sum(map(len, _plans.values())) >= LIMIT:
        _plans.clear()
    _keep(key_of(op.name, given), given, signature, plan)
    return result


def fault_of(op: Op, arguments: Arguments) -> str:
    """What is wrong with the plan that is kept for these arguments; empty if nothing is, or there is none."""
    given = flat(arguments)
    alike = _plans.get(key_of(op.name, given), ())
    found = [one.plan for one in alike if one.signature.fits(given)]
    if not found:
        return ""
    expected: Plan = FunctionPlan(op)
    if backend.backend_of(op.name, arguments[0].device) == "triton":
        _, expected = _made(op, arguments)
    if expected in found:
        return ""
    return f"the plan kept for {op.name} is {found[0]}, which is not what the op runs"


def clear() -> None:
    """Forget all plans."""
    _plans.clear()


def _keep(key: tuple[Any, ...], given: Arguments, signature: Signature, plan: Plan) -> None:
    """In front of those for other layers and addresses."""
    places, values, same, _ = signature
    others = [i for i in range(len(values)) if i not in places]
    made = Kept(
        same, _getter(places), _getter(others), tuple(values[i] for i in others), plan.runner(),
        any(given[i].requires_grad for i in places), signature, plan,
    )  # fmt: skip
    rest = [one for one in _plans.get(key, ()) if one.plan != plan or not one.signature.fits(given)]
    _plans[key] = [made, *rest[: ALIKE - 1]]


def _getter(places: Any) -> Callable[[Arguments], Arguments]:
    """The arguments in some places, always a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    (only,) = places or (None,)
    return (lambda arguments: ()) if only is None else lambda arguments: (arguments[only],)


def _made(op: Op, arguments: Arguments) -> tuple[Any, Plan]:
    """The result of a call, and its plan."""
    device = arguments[0].device
    if backend.backend_of(op.name, device) != "triton":
        plan = FunctionPlan(op)
        return plan(arguments), plan
    from ditq_kernels._triton.parts import replay  # Triton only where it runs

    return replay.made(op, arguments)
