"""Residual stream + gate * linear, into the linear's GEMM."""

from __future__ import annotations

from typing import Any

from torch import fx

from ditq_runtime.speed.backend.graph import Graph, broadcasts, is_tensor, same_shape, value_of
from ditq_runtime.speed.backend.parts import (
    ADD,
    MULTIPLY,
    OPS,
    Gemm,
    before_widening,
    gemm_behind,
    is_cast,
    operands,
)


def fuse_residual(graph: Graph) -> None:
    """Sums of a tensor and a GEMM that nobody else reads; a gate for each sample or token may stand between."""
    for node in graph.nodes:
        for stream, term in operands(node, ADD):
            if is_tensor(stream) and is_tensor(term) and _fused(graph, node, stream, term):
                break


def _fused(graph: Graph, node: fx.Node, stream: fx.Node, term: fx.Node) -> bool:
    value, path = value_of(node), [node]
    found, gate = _gated(term, value, path)
    if found is None or not same_shape(value, value_of(stream)) or value.shape[-1] != found.width:
        return False
    base, ends = _stream(node, stream)
    first = graph.first(path)
    if not graph.steady((*found.head, *found.tail, gate, base), first, node):
        return False
    rows, dtype = graph.rows(base, found.width, node), value_of(ends[0]).dtype
    if value_of(rows).dtype != dtype:
        rows = graph.add("to", (rows, dtype), node)
    gates = None if gate is None else graph.sample_rows(gate, found.width, node)
    arguments = (*found.head, rows, gates, *found.tail)
    added = graph.add(OPS.gemm_residual.default, arguments, node)
    result = graph.add("reshape_as", (added, base), node)
    for end in ends:
        graph.replace(end, result)
    if node not in ends:
        graph.fx.erase_node(node)
    graph.fired["gemm_residual"] += 1
    return True


def _gated(term: fx.Node, value: Any, path: list[fx.Node]) -> tuple[Gemm | None, fx.Node | None]:
    """The GEMM of a term, and its gate if it has one."""
    if len(term.users) != 1:
        return None, None
    for gate, y in operands(term, MULTIPLY):
        inside: list[fx.Node] = [term]
        found = gemm_behind(y, inside)
        if found is not None and broadcasts(gate, value):
            path.extend(inside)
            return found, gate
    return gemm_behind(term, path), None


def _stream(node: fx.Node, stream: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The stream as it is stored, and what reads the sum in the stream's own dtype: itself, or its casts."""
    base = before_widening(stream)
    dtype = value_of(base).dtype
    users = list(node.users)
    if value_of(node).dtype != dtype and all(
        is_cast(user) and value_of(user).dtype == dtype for user in users
    ):
        return base, users
    if value_of(node).dtype == dtype:
        return base, [node]
    return stream, [node]
