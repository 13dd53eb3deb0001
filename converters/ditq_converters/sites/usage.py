"""What a linear is for, told from what flows into it and out of it, not from its name."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from ditq_converters.sites.trace import MOVES, Graph, Op, tensors_in

ACTIVATIONS = frozenset({
    "gelu", "silu", "relu", "tanh", "sigmoid", "leaky_relu", "mish", "softplus", "elu", "hardswish",
})  # fmt: skip
PICKS = frozenset({"index", "index_select", "gather", "masked_select"})
SPREADS = frozenset({"index_put", "index_add", "scatter", "scatter_add", "scatter_reduce", "where"})
THROUGH = MOVES | ACTIVATIONS | {"add", "sub", "mul", "div", "_softmax", "softmax"}


class Usage:
    """Roles of the linears of one traced forward.

    Attributes:
        graph: the forward.
        batch: samples in it.
        users: for every value, the operations that read it.
    """

    def __init__(self, graph: Graph, inputs: dict[str, Any]) -> None:
        """Find what depends on what."""
        self.graph, self.batch = graph, batch_of(inputs)
        self._conditions = {
            name
            for name, argument in inputs.items()
            if all(self._is_condition(leaf) for leaf in tensors_in(argument))
        }
        self.users = graph.users()

    def per_sample(self, name: str) -> bool:
        """Whether a linear reads one row per sample, or what depends on nothing but timestep, label and the like."""
        calls = self.graph.calls[name]
        rows = [self.graph.values[op.get("input")].shape[:-1].numel() for op in calls]
        depends = frozenset().union(*(self.depends[op.get("input")] for op in calls))
        return max(rows) <= self.batch or depends <= self._conditions

    def embeds(self, name: str) -> bool:
        """Whether all that comes out of a per-sample linear passes an activation into another per-sample linear."""
        return self._reaches(name) == {True}

    @cached_property
    def depends(self) -> list[frozenset[str]]:
        """For every value, the arguments of the model that it depends on."""
        found: list[frozenset[str]] = []
        for value in self.graph.values:
            if value.rewritten:
                found.append(frozenset().union(*(found[i] for i in value.rewritten)))
            elif value.op is not None:
                found.append(frozenset().union(*(found[i] for i in value.op.inputs)))
            else:
                found.append(frozenset({value.argument} if value.argument else ()))
        return found

    @cached_property
    def scattered(self) -> list[bool]:
        """For every value, whether its rows were picked by what the model computed, as experts' tokens are."""
        found: list[bool] = []
        for value in self.graph.values:
            op = value.op
            if op is None:
                found.append(False)
                continue
            picked = op.name in PICKS and any(self.depends[i] for i in op.inputs[1:])
            passed = op.name not in SPREADS and any(found[i] for i in op.inputs[:1])
            found.append(picked or passed)
        return found

    def _reaches(self, name: str) -> set[bool]:
        """Ends of the ways out of a linear: True for a per-sample linear behind an activation, else False."""
        ends: set[bool] = set()
        todo: list[tuple[int, bool]] = [
            (out, False) for op in self.graph.calls[name] for out in op.outputs if out is not None
        ]
        seen = set(todo)
        while todo:
            value, activated = todo.pop()
            for op in self.users[value]:
                step = self._step(op, activated)
                if isinstance(step, bool):
                    ends.add(step)
                    continue
                for out in op.outputs:
                    if out is not None and (out, step[0]) not in seen:
                        seen.add((out, step[0]))
                        todo.append((out, step[0]))
        return ends

    def _step(self, op: Op, activated: bool) -> bool | tuple[bool]:
        """An end, or (whether an activation has been passed,) to go on."""
        linear = self.graph.linear_of.get(op.index)
        if linear is not None:
            return activated and self.per_sample(linear)
        if op.name in ACTIVATIONS:
            return (True,)
        condition = op.outputs[0] is not None and self.depends[op.outputs[0]] <= self._conditions
        return (activated,) if op.name in THROUGH and condition else False

    def _is_condition(self, leaf: torch.Tensor) -> bool:
        """A number, one per sample, or one row of numbers per sample; [B, T] of integers are tokens."""
        if leaf.dim() < 2:
            return leaf.dim() == 0 or len(leaf) == self.batch
        return leaf.dim() == 2 and len(leaf) == self.batch and leaf.is_floating_point()


def batch_of(inputs: dict[str, Any]) -> int:
    """Samples in a batch: what one-dimensional arguments (timestep, label) agree on, else the first dimension."""
    tensors = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.dim()]
    sizes = [len(x) for x in tensors if x.dim() == 1] or [len(x) for x in tensors]
    return min(sizes, default=1)
