"""GEMMs that read one quantized input, in one launch; each keeps its weights."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from ditq_runtime.speed.backend.graph import Graph, value_of
from ditq_runtime.speed.backend.parts import OPS, Gemm, gemm

TOGETHER = (
    4  # at most: those of Flux's single block; more would bring results early that are read late
)


def fuse_many(graph: Graph) -> None:
    """GEMMs of one kind on one input whose results stay floats, with biases or without, no low-rank branches."""
    alike: dict[Any, list[Gemm]] = {}
    for node in graph.nodes:
        found = gemm(node)
        if found is not None and found.given["lora_x"] is None and _is_contiguous(found):
            alike.setdefault(_key(found), []).append(found)
    for members in alike.values():
        for some in _together(graph, members):
            _fuse(graph, some)


def _key(found: Gemm) -> tuple[Any, ...]:
    """Equal for GEMMs that may share a launch."""
    given = found.given
    groups = [None if part is None else value_of(part).shape[1] for part in found.head[2:]]
    return (
        found.node.target, given["q"], given["scale"], given["zero_point"], given["bias_index"], given["out_dtype"],
        given["bias"] is None, given["weight_sum"] is None, *groups,
    )  # fmt: skip


def _is_contiguous(found: Gemm) -> bool:
    return bool(value_of(found.head[1]).is_contiguous())


def _together(graph: Graph, members: list[Gemm]) -> Iterator[list[Gemm]]:
    """Those that can run where the first of them stands, a few at a time."""
    some: list[Gemm] = []
    for member in members:
        if some and not _can_run_at(graph, member, some[0].node):
            continue
        some.append(member)
        if len(some) == TOGETHER:
            yield some
            some = []
    if len(some) > 1:
        yield some


def _can_run_at(graph: Graph, member: Gemm, first: fx.Node) -> bool:
    read = [one for one in (*member.head, *member.tail) if isinstance(one, fx.Node)]
    return graph.stand_before(read, first) and graph.steady(read, first, member.node)


def _fuse(graph: Graph, some: list[Gemm]) -> None:
    first = some[0]
    given = first.given

    def each(*values: Any) -> list[Any]:
        return [] if values[0] is None else list(values)

    heads = (each(*(member.head[i] for member in some)) for i in (1, 2, 3))
    stages = {
        name: each(*(member.given[name] for member in some))
        for name in ("weight_scale", "bias", "weight_sum")
    }
    arguments = (
        given["q"], *heads, given["scale"], stages["weight_scale"], stages["bias"], given["zero_point"],
        stages["weight_sum"], given["bias_index"], given["out_dtype"],
    )  # fmt: skip
    made = graph.add(OPS.gemm_many.default, arguments, first.node)
    results = [graph.add(operator.getitem, (made, i), first.node) for i in range(len(some))]
    for member, result in zip(some, results, strict=True):
        graph.replace(member.node, result)
    graph.fired["gemm_many"] += 1
