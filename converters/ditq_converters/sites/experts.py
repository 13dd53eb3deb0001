"""Mixtures of experts and gates, told by shape and use: routers, weights of all experts in one tensor, few numbers.

None of them becomes integers; each is named with its reason, so that coverage can count what they hold.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ditq_converters.sites.trace import MOVES, Graph, Op
from ditq_converters.sites.usage import THROUGH, Usage

SELECTIONS = frozenset({"topk", "sort", "argsort", "argmax", "max"})
PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "linear", "_grouped_mm"})
FEW = 16  # a gate has at most this share of its inputs as outputs: one number per head or fewer

EXPERTS = "weights of all experts in one tensor that is no linear, kept float"


def routes(usage: Usage, name: str) -> bool:
    """Whether the output of a linear decides which experts run."""
    return _leads_to(usage, name, lambda op: op.name in SELECTIONS)


def gates(usage: Usage, name: str) -> bool:
    """Whether a linear makes a few numbers per token that multiply others, or bias a softmax."""
    linear = usage.graph.modules[name]
    assert isinstance(linear, nn.Linear)
    if linear.out_features * FEW > linear.in_features:
        return False
    return _leads_to(usage, name, lambda op: op.name in ("mul", "add", "sdpa"))


def expert_parameters(usage: Usage) -> list[str]:
    """Parameters [E, in, out] that are multiplied one expert at a time, or all at once."""
    found: dict[str, None] = {}
    for index, value in enumerate(usage.graph.values):
        owner = usage.graph.modules.get((value.parameter or "").rpartition(".")[0])
        matrices = value.tensor.dim() == 3 and min(value.shape) > 1
        plain = isinstance(owner, nn.Conv1d | nn.ConvTranspose1d | nn.Embedding)
        if value.parameter and matrices and not plain and _multiplied(usage, index):
            found[value.parameter] = None
    return list(found)


def _multiplied(usage: Usage, value: int) -> bool:
    """Whether a value, moved about, is the factor of a matrix product."""
    for op in usage.users[value]:
        moved = op.name in MOVES and any(
            out is not None and _multiplied(usage, out) for out in op.outputs
        )
        if op.name in PRODUCTS or moved:
            return True
    return False


def _leads_to(usage: Usage, name: str, wanted: Callable[[Op], bool]) -> bool:
    """Whether what comes out of a linear reaches such an operation before the next linear."""
    seen: set[int] = set()
    todo = _outputs(usage.graph, name)
    while todo:
        for op in usage.users[todo.pop()]:
            if op.index in seen:
                continue
            seen.add(op.index)
            if wanted(op):
                return True
            if op.name in THROUGH:
                todo += [out for out in op.outputs if out is not None]
    return False


def _outputs(graph: Graph, name: str) -> list[int]:
    return [out for op in graph.calls[name] for out in op.outputs if out is not None]
