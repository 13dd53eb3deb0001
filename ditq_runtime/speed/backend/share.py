"""Equal nodes that change nothing, once: the linears of an attention quantize one input each for itself."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from ditq_runtime.speed.backend.graph import Graph, value_of
from ditq_runtime.speed.backend.parts import ADD, CASTS, DIVIDE, GELU, MULTIPLY, VIEWS

METHODS = (
    VIEWS | CASTS
    | {"chunk", "split", "unbind", "transpose", "permute", "unsqueeze", "squeeze", "expand", "t"}
)  # fmt: skip
FUNCTIONS = frozenset(
    {
        *ADD, *MULTIPLY, *DIVIDE, *GELU, operator.getitem, operator.sub, operator.neg, getattr,
        torch.cat, torch.chunk, torch.exp, torch.sin, torch.cos, torch.arange, torch.unsqueeze,
        functional.silu, functional.layer_norm, functional.rms_norm,
        getattr(torch._C._autograd, "_get_data_attr", None),  # x.data, as torch 2.13 traces it
    }
)  # fmt: skip


def share(graph: Graph) -> None:
    """Let all readers of equal results read the first; results that something writes into stay apart."""
    seen: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if not _is_pure(node) or value_of(node) is None or graph.ever_written(node):
            continue
        key = (node.op, node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is node:
            continue
        if graph.steady(node.all_input_nodes, first, node):
            if _is_ours(node):
                graph.fired[f"{node.target._opname}: shared"] += 1  # type: ignore[union-attr]
            graph.replace(node, first)
        else:
            seen[key] = node


def _is_pure(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in METHODS
    return node.op == "call_function" and (node.target in FUNCTIONS or _is_ours(node))


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "ditq"


def _key(value: Any) -> Any:
    """Equal for equal arguments; 1, 1.0 and True differ."""
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(_key(one) for one in value)
    if isinstance(value, dict):
        return tuple(sorted((name, _key(one)) for name, one in value.items()))
    if isinstance(value, slice):
        return "slice", _key((value.start, value.stop, value.step))
    return value if isinstance(value, fx.Node) else (type(value).__name__, str(value))
