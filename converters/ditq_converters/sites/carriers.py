"""Walk back from a site's input to what could carry a factor per channel: rows of linears, weights of norms.

Each channel is followed by running data movements on tensors of indices, so reshapes, heads, splits and concatenations
need no rules of their own. What is found is a guess that `prove.py` puts to the test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ditq_converters.sites.trace import MOVES, Graph, Op, Ref

NONE = -1  # channel of an element that belongs to none


@dataclass(frozen=True)
class Carrier:
    """Something whose entries each belong to one channel of the site.

    Attributes:
        name: of a linear, or of a parameter.
        channels: [N] int64: channel of every row of the linear, of every entry of the parameter; -1: of none.
        is_linear: whether it is a linear.
        attended: attention stands between it and the site.
    """

    name: str
    channels: torch.Tensor
    is_linear: bool
    attended: bool


class Stuck(Exception):
    """No factor passes here."""


class Walk:
    """Walks back through one graph."""

    def __init__(self, graph: Graph) -> None:
        """Of `graph`."""
        self.graph = graph

    def carriers(self, value: int) -> tuple[list[Carrier], torch.Tensor]:
        """What makes a value [..., K].

        Returns:
            Carriers, and [K] bool: the channels that have one. Empty where nothing carries any.
        """
        shape = self.graph.values[value].shape
        channels = torch.arange(shape[-1]).expand(shape).contiguous()
        try:
            found = self._from(value, channels, False)
        except Stuck:
            return [], torch.zeros(shape[-1], dtype=torch.bool)
        carried = torch.zeros(shape[-1], dtype=torch.bool)
        for carrier in found:
            carried[carrier.channels[carrier.channels >= 0]] = True
        return _merged(found), carried

    def _from(self, value: int, channels: torch.Tensor, attended: bool) -> list[Carrier]:
        """Carriers of a value whose elements belong to `channels`."""
        known = self.graph.values[value]
        op = known.op
        if op is None:
            if known.parameter is None:
                raise Stuck
            return [Carrier(known.parameter, channels.flatten(), False, attended)]
        if op.name in MOVES:
            return self._moved(op, op.outputs.index(Ref(value)), channels, attended)
        step = STEPS.get(op.name)
        if step is None:
            raise Stuck
        return step(self, op, channels, attended)

    def _moved(self, op: Op, k: int, channels: torch.Tensor, attended: bool) -> list[Carrier]:
        """Through a data movement; where it puts several tensors together, some of them may carry nothing."""
        found, stuck = [], 0
        sources = source_map(self.graph, op, k)
        for source, where in sources:
            moved = _scatter(channels, where, self.graph.values[source].shape)
            try:
                found += self._from(source, moved, attended)
            except Stuck:
                stuck += 1
        if stuck and (stuck == len(sources) or op.name != "cat"):
            raise Stuck
        return found

    def _linear(self, op: Op, channels: torch.Tensor, attended: bool) -> list[Carrier]:
        name = self.graph.linear_of.get(op.index)
        if name is None:
            raise Stuck
        return [Carrier(name, _same(channels.reshape(-1, channels.shape[-1]), 0), True, attended)]

    def _norm(self, op: Op, channels: torch.Tensor, attended: bool) -> list[Carrier]:
        """A norm's own weight, and its bias where it has one."""
        weight = op.get("weight")
        if weight is None:
            raise Stuck
        bias = op.get("bias") if op.name == "layer_norm" else None
        found = self._operand(weight, channels, attended)
        return found if bias is None else found + self._operand(bias, channels, attended)

    def _product(self, op: Op, channels: torch.Tensor, attended: bool) -> list[Carrier]:
        """One operand carries the factor: a parameter before all else."""
        if op.name == "div" or not all(isinstance(a, Ref) for a in op.args[:2]):
            operands = [a for a in op.args[:1] if isinstance(a, Ref)]
        else:
            operands = sorted(op.args[:2], key=self._is_parameter, reverse=True)
        for operand in operands:
            try:
                return self._operand(operand, channels, attended)
            except Stuck:
                continue
        raise Stuck

    def _sum(self, op: Op, channels: torch.Tensor, attended: bool) -> list[Carrier]:
        """Both terms carry it."""
        if op.kwargs.get("alpha", 1) != 1 or not all(isinstance(a, Ref) for a in op.args[:2]):
            raise Stuck
        first, second = op.args[:2]
        return [
            *self._operand(first, channels, attended),
            *self._operand(second, channels, attended),
        ]

    def _sdpa(self, op: Op, channels: torch.Tensor, attended: bool) -> list[Carrier]:
        """The values; heads of queries may share one."""
        value = op.get("value")
        shape = self.graph.values[value].shape
        one = _same(channels, -2)  # [B, H, D]
        if len(shape) > 3 and one.shape[-2] != shape[-3]:
            one = _same(one.unflatten(-2, (shape[-3], -1)), -2)
        return self._from(value, one[..., None, :].expand(shape).contiguous(), True)

    def _matmul(self, op: Op, channels: torch.Tensor, attended: bool) -> list[Carrier]:
        """Attention written out: columns of the second factor, or else rows of the first."""
        first, second = op.args[:2]
        try:
            columns = _same(channels, -2)[..., None, :]
            shape = self.graph.values[second].shape
            return self._from(second, columns.expand(shape).contiguous(), True)
        except Stuck:
            rows = _same(channels, -1)[..., None]
            shape = self.graph.values[first].shape
            return self._from(first, rows.expand(shape).contiguous(), True)

    def _operand(self, value: int, channels: torch.Tensor, attended: bool) -> list[Carrier]:
        """Against broadcasting."""
        shape = self.graph.values[value].shape
        where = torch.arange(shape.numel()).reshape(shape).expand(channels.shape)
        return self._from(value, _scatter(channels, where, shape), attended)

    def _is_parameter(self, value: int) -> bool:
        return self.graph.values[self.graph.root(value)].parameter is not None


STEPS: dict[str, Any] = {
    "linear": Walk._linear,
    "layer_norm": Walk._norm,
    "rms_norm": Walk._norm,
    "mul": Walk._product,
    "div": Walk._product,
    "add": Walk._sum,
    "sdpa": Walk._sdpa,
    "bmm": Walk._matmul,
    "mm": Walk._matmul,
}


def source_map(graph: Graph, op: Op, k: int) -> list[tuple[int, torch.Tensor]]:
    """Of a data movement: for each tensor it moves, the element of it that every element of output k is, or -1."""
    found = []
    for moved in dict.fromkeys(op.data):

        def index(leaf: Any, moved: int = moved) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            value = graph.values[leaf]
            if leaf == moved:
                return torch.arange(value.shape.numel()).reshape(value.shape)
            return torch.full(value.shape, NONE) if leaf in op.data else value.tensor

        args, kwargs = tree_map(index, (op.args, op.kwargs))
        if op.name in ("_to_copy", "clone", "lift_fresh", "native_dropout"):
            out = args[0]
        elif op.name == "constant_pad_nd":
            out = op.func(args[0], args[1], NONE)
        else:
            out = op.func(*args, **kwargs)
        found.append((moved, out[k] if isinstance(out, list | tuple) else out))
    return found


def _scatter(channels: torch.Tensor, where: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Channels of elements, brought to the elements `where` that they come from; Stuck where two would meet."""
    where, channels = where.flatten(), channels.flatten()
    use = (channels >= 0) & (where >= 0)  # the rest comes from another tensor, or is padding
    brought = torch.full((shape.numel(),), NONE)
    brought[where[use]] = channels[use]
    if bool((brought[where[use]] != channels[use]).any()):
        raise Stuck
    return brought.reshape(shape)


def _same(channels: torch.Tensor, dim: int) -> torch.Tensor:
    """Channels along a dimension that shares them; Stuck where they differ."""
    low, high = channels.masked_fill(channels < 0, torch.iinfo(channels.dtype).max), channels
    least, most = low.amin(dim), high.amax(dim)
    if bool((least != most)[most >= 0].any()):
        raise Stuck
    return most


def _merged(carriers: list[Carrier]) -> list[Carrier]:
    """One carrier a name, though several ways lead to it; none if they disagree."""
    found: dict[str, Carrier] = {}
    for carrier in carriers:
        other = found.setdefault(carrier.name, carrier)
        both = (other.channels >= 0) & (carrier.channels >= 0)
        if bool((other.channels != carrier.channels)[both].any()):
            return []
        channels = torch.maximum(other.channels, carrier.channels)
        attended = other.attended or carrier.attended
        found[carrier.name] = Carrier(carrier.name, channels, carrier.is_linear, attended)
    return list(found.values())
