"""A graph of Dynamo that is being rewritten: reading it, writing into it, and what makes either safe.

It is not functionalized: nodes may write into memory that others read. Each node carries the fake tensors that it gave
when it was traced (`example_value`), whose storages say what shares memory, and whose sizes may be symbols: they are
compared by what is known of them and never guarded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from ditq_runtime.speed.backend.writes import Writes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Graph:
    """One graph, for the length of one pass.

    Attributes:
        module: what runs it.
        fx: its nodes.
        fired: what passes did -> how often.
    """

    def __init__(self, module: fx.GraphModule, fired: Counter[str]) -> None:
        """Number the nodes, and find those that write."""
        self.module, self.fx, self.fired = module, module.graph, fired
        self.nodes = list(self.fx.nodes)
        self._place = {node: at for at, node in enumerate(self.nodes)}
        self._writes = Writes(self.nodes)
        leaves = [leaf for node in self.nodes for leaf in tree_leaves(value_of(node))]
        # not that of the backend, which Dynamo changes: the one of the traced values
        self._fakes = next(
            (leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None
        )

    def add(
        self, target: Callable[..., Any] | str, arguments: tuple[Any, ...], before: fx.Node
    ) -> fx.Node:
        """A new node, with what it gives: a function or operator, or a method by its name."""
        with self.fx.inserting_before(before):
            if isinstance(target, str):
                node = self.fx.call_method(target, arguments)
            else:
                node = self.fx.call_function(target, arguments)
        self._place[node] = self._place[before]
        values = fx.node.map_arg(arguments, value_of)
        assert self._fakes is not None
        with self._fakes, torch.no_grad():
            run = target if callable(target) else getattr(values[0], target)
            node.meta["example_value"] = run(*values) if callable(target) else run(*values[1:])
        return node

    def rows(self, node: fx.Node, width: int, before: fx.Node) -> fx.Node:
        """A tensor [..., width] as rows [T, width] whose elements are neighbours."""
        value = value_of(node)
        if value.dim() != 2:
            node = self.add("reshape", (node, -1, width), before)
        if not known(value_of(node).stride(1) == 1):
            node = self.add("contiguous", (node,), before)
        return node

    def sample_rows(self, node: fx.Node, width: int, before: fx.Node) -> fx.Node:
        """A vector for each sample, as `broadcasts` knows them, as fp32 rows [B, width]."""
        rows = self.rows(node, width, before)
        return rows if value_of(rows).dtype == torch.float32 else self.add("float", (rows,), before)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let the readers of one node read another."""
        old.replace_all_uses_with(new)
        self.fx.erase_node(old)

    def steady(self, read: Iterable[Any], first: fx.Node, last: fx.Node) -> bool:
        """Whether what was read by nodes from `first` on is the same where `last` stands."""
        nodes = [node for node in read if isinstance(node, fx.Node)]
        return not self._writes.between(nodes, self._place[first], self._place[last])

    def stand_before(self, nodes: Iterable[fx.Node], last: fx.Node) -> bool:
        """Whether some nodes all stand before another."""
        return all(self._place[node] < self._place[last] for node in nodes)

    def ever_written(self, node: fx.Node) -> bool:
        """Whether some node writes into what this one gives."""
        return self._writes.ever(node)

    def first(self, nodes: Iterable[fx.Node]) -> fx.Node:
        """The earliest of some nodes."""
        return min(nodes, key=self._place.__getitem__)

    def finish(self) -> None:
        """Drop what nobody reads, and let the module run what is left."""
        self.fx.eliminate_dead_code(is_impure_node=self._writes.is_needed)
        self.fx.lint()
        self.module.recompile()


def value_of(node: fx.Node) -> Any:
    """What a node gave when it was traced: a fake tensor, several, a number, or None where that is not known."""
    return node.meta.get("example_value")


def is_tensor(node: Any) -> bool:
    """Whether something in a graph is a node that gives one tensor."""
    return isinstance(node, fx.Node) and isinstance(value_of(node), torch.Tensor)


def known(condition: Any) -> bool:
    """Whether a condition on sizes is known to hold, without asking for a guard."""
    return bool(statically_known_true(condition))


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are known to have one shape."""
    return a.dim() == b.dim() and all(known(i == j) for i, j in zip(a.shape, b.shape, strict=True))


def broadcasts(vector: Any, like: torch.Tensor) -> bool:
    """Whether a node gives numbers for each sample, each token, or all: [B, 1, D], [1, 1, D], [B, L, D] or [D]."""
    if not is_tensor(vector) or value_of(vector).dtype not in FLOATS:
        return False
    value = value_of(vector)
    if value.dim() == 0 or value.dim() > like.dim() or not known(value.shape[-1] == like.shape[-1]):
        return False
    if same_shape(value, like) or all(known(size == 1) for size in value.shape[:-1]):
        return True
    samples, *between, _ = value.shape
    whole = value.dim() == like.dim() and known(samples == like.shape[0])
    return whole and all(known(size == 1) for size in between)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node that calls an operator, by the names of its schema, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip([one.name for one in schema], node.args, strict=False)) | node.kwargs
    return {one.name: given.get(one.name, one.default_value) for one in schema}
