"""The plan of a call on a Triton kernel: launches to repeat, for one layer where its weights were prepared."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

from ditq_kernels._triton.parts.places import CannotRepeatError
from ditq_kernels._triton.parts.replay import LaunchPlan, plan_of
from ditq_kernels.launch.plans import Arguments, FunctionPlan, Op, Plan, flat
from ditq_kernels.launch.recording import Recording


def made(op: Op, arguments: Arguments) -> tuple[Any, Plan]:
    """The result of a call on the kernel of an op, and what repeats it."""
    with Recording() as recording:
        result = op.implementation(arguments[0].device)(*arguments)
    try:
        plan = plan_of(op, arguments, recording, result)
        parts = [part for parts, _ in recording.prepared for part in parts]
        return result, _of_layer(plan, parts, arguments) if parts else plan
    except CannotRepeatError:
        return result, FunctionPlan(op)


@dataclass(frozen=True)
class LayerPlans:
    """Plans of a signature whose kernels read weights prepared from tensors of the call: one for each layer.

    Attributes:
        positions: of those tensors in the arguments.
        nested: arguments have lists.
        plans: identity, address and version of those tensors -> the plan, references whose death removes it.
    """

    positions: tuple[int, ...]
    nested: bool
    plans: dict[tuple[int, ...], tuple[LaunchPlan, tuple[weakref.ref, ...]]]

    def __call__(self, arguments: Arguments) -> Any:
        """Run the plan of these weights."""
        plan = self.of(arguments)
        assert plan is not None
        return plan(arguments)

    def of(self, arguments: Arguments) -> LaunchPlan | None:
        """The plan of these weights, if they are as they were."""
        given = flat(arguments) if self.nested else arguments
        found = self.plans.get(_stamps([given[i] for i in self.positions]))
        return None if found is None else found[0].of(arguments)

    def beside(self, before: Plan) -> Plan:
        """Joins the plans that were kept for other layers."""
        if not isinstance(before, LayerPlans) or before.positions != self.positions:
            return self
        for plan, references in self.plans.values():
            before.add(plan, [reference() for reference in references])
        return before

    def add(self, plan: LaunchPlan, parts: list[Any]) -> None:
        """Keep the plan of one layer, in the place of those for what its weights were."""
        key = _stamps(parts)
        for old in [old for old in self.plans if old[::3] == key[::3]]:
            del self.plans[old]
        forget = functools.partial(_forget, self.plans, key)
        self.plans[key] = plan, tuple(weakref.ref(part, forget) for part in parts)


def _of_layer(plan: LaunchPlan, parts: list[Any], arguments: Arguments) -> LayerPlans:
    given = flat(arguments)
    places = [[i for i, one in enumerate(given) if one is part] for part in parts]
    if not all(len(found) == 1 for found in places) or any(part.is_inference() for part in parts):
        raise CannotRepeatError  # inference tensors count no versions: they are prepared at every call
    made = LayerPlans(tuple(found[0] for found in places), plan.nested, {})
    made.add(plan, parts)
    return made


def _stamps(parts: list[Any]) -> tuple[int, ...]:
    """What changes when weights do; empty if one is an inference tensor."""
    try:
        return tuple([one for p in parts for one in (id(p), p.data_ptr(), p._version)])
    except RuntimeError:
        return ()


def _forget(plans: dict[tuple[int, ...], Any], key: tuple[int, ...], _: weakref.ref) -> None:
    plans.pop(key, None)
