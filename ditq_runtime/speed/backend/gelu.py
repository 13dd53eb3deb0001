"""GELU and the quantizer behind it, in one op, or in the GEMM before it where the quantizer is static."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ditq_runtime.speed.backend.graph import FLOATS, Graph, arguments_of, value_of
from ditq_runtime.speed.backend.parts import (
    OPS,
    PER_TOKEN,
    STATIC,
    behind,
    calls,
    gemm_behind,
    is_tanh_gelu,
    one_static_scale,
)


def fuse_gelu(graph: Graph) -> None:
    """Quantizers of GELU in its tanh form that nobody else reads."""
    for node in graph.nodes:
        if not calls(node, PER_TOKEN, STATIC):
            continue
        given, static = arguments_of(node), node.target == STATIC
        if static and not one_static_scale(given):
            continue
        path: list[fx.Node] = [node]
        gelu = behind(given["x"], path)
        if not is_tanh_gelu(gelu) or len(gelu.users) != 1:
            continue
        path.append(gelu)
        if not (static and given["group_shift"] is None and _into_gemm(graph, node, given, path)):
            _alone(graph, node, given, path)


def _into_gemm(graph: Graph, node: fx.Node, given: dict[str, Any], path: list[fx.Node]) -> bool:
    inside = list(path)
    found = gemm_behind(path[-1].args[0], inside)
    if found is None or value_of(given["x"]).shape[-1] != found.width:
        return False
    out = (given["scale"], given["zero_point"], given["smooth_inv"])
    if not graph.steady((*found.head, *found.tail, *out), graph.first(inside), node):
        return False
    arguments = (*found.head, *out, *found.tail)
    graph.replace(node, graph.add(OPS.gemm_gelu_quantize.default, arguments, node))
    graph.fired["gemm_gelu_quantize"] += 1
    return True


def _alone(graph: Graph, node: fx.Node, given: dict[str, Any], path: list[fx.Node]) -> None:
    x, width = path[-1].args[0], value_of(given["x"]).shape[-1]
    if not isinstance(x, fx.Node) or value_of(x).dtype not in FLOATS or not isinstance(width, int):
        return
    static = node.target == STATIC
    step = (given["scale"], given["zero_point"]) if static else (None, None)
    shift = (given["group_shift"], given["group_index"])
    if not graph.steady((x, given["smooth_inv"], *step, *shift), graph.first(path), node):
        return
    arguments = (
        graph.rows(x, width, node), given["smooth_inv"], *step, *shift, given.get("asymmetric", False),
    )  # fmt: skip
    codes = graph.add(OPS.gelu_quantize.default, arguments, node)
    graph.replace(node, graph.add(operator.getitem, (codes, 0), node) if static else codes)
    graph.fired["gelu_quantize"] += 1
