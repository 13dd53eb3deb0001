"""Layer norm, modulation and the quantizers behind it, in one op."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.nn import functional

from ditq_runtime.speed.backend.graph import (
    FLOATS,
    Graph,
    arguments_of,
    broadcasts,
    is_tensor,
    known,
    value_of,
)
from ditq_runtime.speed.backend.parts import (
    ADD,
    MULTIPLY,
    OPS,
    PER_TOKEN,
    STATIC,
    before_widening,
    behind,
    calls,
    is_cast,
    is_view,
    one_static_scale,
    operands,
)


def fuse_adaln(graph: Graph) -> None:
    """Quantizers of LN(x) * multiplier + shift, where nobody reads that as floats.

    A quantizer that subtracts a shift of its own stays: `adaln_quantize` would subtract it before the sum, which rounds
    otherwise.
    """
    for node in graph.nodes:
        if not calls(node, PER_TOKEN, STATIC):
            continue
        given = arguments_of(node)
        path: list[fx.Node] = [node]
        modulated = behind(given["x"], path, shared=True)
        if given["group_shift"] is not None or not _only_quantized(modulated):
            continue
        if node.target == STATIC and not one_static_scale(given):
            continue
        any(_fused(graph, node, given, *found, path) for found in _modulations(modulated, path))


def _modulations(node: Any, path: list[fx.Node]) -> Iterator[tuple[Any, Any, Any]]:
    """What may be norm, multiplier and shift of a sum of a product."""
    for product, shift in operands(node, ADD):
        for normed, multiplier in operands(product, MULTIPLY):
            yield behind(normed, path), multiplier, shift


def _only_quantized(node: Any) -> bool:
    """Whether all that reads a node, behind views and casts, quantizes it."""
    if not is_tensor(node):
        return False
    return all(
        calls(user, PER_TOKEN, STATIC)
        or ((is_view(user) or is_cast(user)) and user.args[0] is node and _only_quantized(user))
        for user in node.users
    )


def _fused(
    graph: Graph,
    node: fx.Node,
    given: dict[str, Any],
    norm: Any,
    multiplier: Any,
    shift: Any,
    path: list[fx.Node],
) -> bool:
    plain = _plain_norm(norm)
    if plain is None:
        return False
    x, eps = plain
    like, rows = value_of(norm), value_of(given["x"])
    width = like.shape[-1]
    if rows.shape[-1] != width or not (broadcasts(multiplier, like) and broadcasts(shift, like)):
        return False
    x = before_widening(x)
    static = node.target == STATIC
    step = (given["scale"], given["zero_point"]) if static else (None, None)
    read = (x, multiplier, shift, given["smooth_inv"], *step)
    if not graph.steady(read, graph.first([*path, norm]), node):
        return False
    per_sample = [graph.sample_rows(vector, width, node) for vector in (multiplier, shift)]
    if not known(value_of(per_sample[0]).shape[0] == value_of(per_sample[1]).shape[0]):
        return False
    arguments = (
        graph.rows(x, width, node), *per_sample, eps, given["smooth_inv"], None, None, *step, None,
        given.get("asymmetric", False),
    )  # fmt: skip
    codes = graph.add(OPS.adaln_quantize.default, arguments, node)
    graph.replace(node, graph.add(operator.getitem, (codes, 0), node) if static else codes)
    graph.fired["adaln_quantize"] += 1
    return True


def _plain_norm(node: Any) -> tuple[fx.Node, Any] | None:
    """The input of a layer norm over the last dimension, without weights, and its epsilon, a number or a node."""
    if not calls(node, functional.layer_norm) or not is_tensor(node):
        return None
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    x = given["input"]
    plain = given.get("weight") is None and given.get("bias") is None
    if not plain or len(given["normalized_shape"]) != 1 or not isinstance(x, fx.Node):
        return None
    if not is_tensor(x) or value_of(x).dtype not in FLOATS:
        return None
    if not isinstance(value_of(x).shape[-1], int):  # a symbol: nothing is known of the rows
        return None
    return x, given.get("eps", 1e-5)
