"""What patterns are made of: sums and products, what changes nothing on the way, GEMMs and quantizers of ours."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from ditq_runtime.speed.backend.graph import FLOATS, arguments_of, is_tensor, value_of

OPS = torch.ops.ditq
ADD = (operator.add, torch.add)
MULTIPLY = (operator.mul, torch.mul)
DIVIDE = (operator.truediv, torch.div, torch.true_divide)
GELU = (functional.gelu, torch._C._nn.gelu)
PER_TOKEN, STATIC = OPS.quantize_per_token.default, OPS.quantize_static.default
VIEWS = frozenset(
    {"reshape", "view", "contiguous", "flatten", "unflatten"}
)  # elements keep their order
CASTS = frozenset({"to", "type", "type_as", "float", "bfloat16", "half"})
SHARED = (
    "scale", "weight_scale", "bias", "zero_point", "weight_sum", "bias_index", "lora_x", "lora_up",
)  # fmt: skip


def calls(node: Any, *targets: Any) -> bool:
    """Whether something is a node that calls one of these functions."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_cast(node: Any) -> bool:
    """Whether a node makes floats of other floats and changes nothing else."""
    if not (is_tensor(node) and node.op == "call_method" and node.target in CASTS):
        return False
    if not is_tensor(node.args[0]):
        return False
    source: Any = node.args[0]
    value, before = value_of(node), value_of(source)
    return value.dtype in FLOATS and before.dtype in FLOATS and value.device == before.device


def is_view(node: Any) -> bool:
    """Whether a node gives the elements of its input in their order, or its input: dropout of nothing, x / 1.0."""
    if not (is_tensor(node) and node.args and is_tensor(node.args[0])):
        return False
    if node.op == "call_method":
        return node.target in VIEWS
    if calls(node, functional.dropout):
        given = dict(zip(("p", "training", "inplace"), node.args[1:], strict=False)) | node.kwargs
        idle = given.get("p", 0.5) == 0.0 or given.get("training", True) is False
        return idle and not given.get("inplace", False)
    return calls(node, *DIVIDE) and node.args[1:] in ((1,), (1.0,)) and not node.kwargs


def behind(node: Any, path: list[fx.Node], *, shared: bool = False) -> Any:
    """What a node gives before views and casts; the nodes on the way join `path`.

    Args:
        node: where to begin.
        path: takes the nodes that were passed.
        shared: pass nodes that others read too.
    """
    while (is_view(node) or is_cast(node)) and (shared or len(node.users) == 1):
        path.append(node)
        node = node.args[0]
    return node


def before_widening(node: fx.Node) -> fx.Node:
    """What a node gives before casts that lose nothing."""
    while is_cast(node):
        source: Any = node.args[0]
        wide, narrow = value_of(node).dtype, value_of(source).dtype
        if torch.promote_types(wide, narrow) != wide:
            break
        node = source
    return node


def operands(node: Any, kinds: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """Both operands of a sum or product, in both orders; nothing for other nodes."""
    if calls(node, *kinds) and len(node.args) == 2 and not node.kwargs:
        first, second = node.args
        yield first, second
        yield second, first


def is_tanh_gelu(node: Any) -> bool:
    """Whether a node is GELU in its tanh form."""
    return calls(node, *GELU) and node.kwargs.get("approximate") == "tanh" and is_tensor(node)


@dataclass(frozen=True)
class Gemm:
    """An integer GEMM with a float result.

    Attributes:
        node: where it stands.
        head: codes, weights, group_scale and group_offset, as fused ops take them.
        tail: from scale to lora_up, as they take them.
        width: N.
        given: all its arguments by name.
    """

    node: fx.Node
    head: tuple[Any, ...]
    tail: tuple[Any, ...]
    width: int
    given: dict[str, Any]


def gemm(node: Any) -> Gemm | None:
    """A node as a GEMM, if it is one."""
    if calls(node, OPS.gemm_w8a8.default):
        given = arguments_of(node)
        head = (given["q"], given["weight"], None, None)
    elif calls(node, OPS.gemm_w4a8.default):
        given = arguments_of(node)
        head = (given["q"], given["packed"], given["group_scale"], given["group_offset"])
    elif calls(node, OPS.gemm_w4a8_per_group.default):
        given = arguments_of(node)
        head = (given["q"], given["packed"], None, given["weight_zero"])
    else:
        return None
    tail = tuple(given[name] for name in SHARED)
    return Gemm(node, head, tail, value_of(node).shape[1], given)


def gemm_behind(node: Any, path: list[fx.Node]) -> Gemm | None:
    """The GEMM before views and casts, which nobody else reads."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    path.append(node)
    found = gemm(behind(node, path))
    if found is None or len(found.node.users) != 1:
        return None
    path.append(found.node)
    return found


def one_static_scale(given: dict[str, Any]) -> bool:
    """Whether the arguments of a static quantizer are one scale and one zero point, as fused ops take them."""
    scale = given["scale"]
    return is_tensor(scale) and value_of(scale).numel() == 1 and given["zero_point"] is not None
