"""Nodes of a graph that change memory, and whether one stands between two places."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

IN_PLACE = frozenset(
    {
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
        operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift,
        operator.irshift, operator.setitem, operator.delitem, setattr,
    }
)  # fmt: skip
METHODS = frozenset(f"__{function.__name__}__" for function in IN_PLACE)  # such as __iadd__


class Writes:
    """Where a graph writes, by the storages of what was traced; other effects stop everything."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        """Look at every node once."""
        self._at: list[tuple[int, frozenset[int] | None]] = []
        self._needed: set[fx.Node] = set()
        for place, node in enumerate(nodes):
            found = written_by(node)
            if found is None or found:
                self._at.append((place, None if found is None else storages(found)))
                self._needed.add(node)

    def between(self, read: Iterable[fx.Node], first: int, last: int) -> bool:
        """Whether what some nodes give changes behind the place `first` and before `last`."""
        memory = storages(read)
        return any(
            first < place < last and (written is None or written & memory)
            for place, written in self._at
        )

    def ever(self, node: fx.Node) -> bool:
        """Whether what a node gives is written into anywhere."""
        memory = storages([node])
        return any(written is not None and written & memory for _, written in self._at)

    def is_needed(self, node: fx.Node) -> bool:
        """Whether a node that nobody reads has an effect."""
        return node.is_impure() or node in self._needed


def storages(nodes: Iterable[fx.Node]) -> frozenset[int]:
    """The memory behind all tensors that some nodes gave."""
    return frozenset(
        leaf.untyped_storage()._cdata
        for node in nodes
        for leaf in tree_leaves(node.meta.get("example_value"))
        if isinstance(leaf, torch.Tensor)
    )


def written_by(node: fx.Node) -> list[fx.Node] | None:
    """Those of a node's inputs that it changes; None: it has other effects, or nobody knows."""
    given: list[Any] = list(node.args)
    if node.op == "call_method":
        name = str(node.target)
        if name in METHODS or (name.endswith("_") and not name.endswith("__")):
            return _nodes(given[:1])
        return _nodes([node.kwargs.get("out")])
    if node.op != "call_function":
        return [] if node.op in ("placeholder", "get_attr", "output") else None
    if node.target in IN_PLACE:
        return _nodes(given[:1])
    if isinstance(node.target, torch._ops.OpOverload):
        return _by_schema(node)
    if isinstance(node.target, torch._ops.HigherOrderOperator) or _sets_a_mode(node.target):
        return None
    name = getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return _nodes(given)
    return _nodes([node.kwargs.get("out"), *(given[:1] if _asked_in_place(node) else ())])


def _by_schema(node: fx.Node) -> list[fx.Node]:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip([one.name for one in schema], node.args, strict=False)) | node.kwargs
    changed = [one.name for one in schema if one.alias_info and one.alias_info.is_write]
    return _nodes([given.get(name) for name in changed])


def _sets_a_mode(target: Any) -> bool:
    """Entering or leaving autocast, grad mode and the like: what stands around has another meaning."""
    name, module = getattr(target, "__name__", ""), getattr(target, "__module__", "") or ""
    return name.startswith(("_enter", "_exit", "_set", "set_")) or module.startswith("torch.amp")


def _asked_in_place(node: fx.Node) -> bool:
    """Functions of torch.nn.functional take `inplace`, by name or place."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if len(node.args) < 2:
        return False
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without one
        return False
    at = names.index("inplace") if "inplace" in names else len(node.args)
    return at < len(node.args) and bool(node.args[at])


def _nodes(given: Any) -> list[fx.Node]:
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, fx.Node)]
