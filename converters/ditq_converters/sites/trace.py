"""One real forward in fp64, as a list of aten operations; linears, attention and norms stay whole.

Operations run with real values, so control flow that looks at data runs as it always does. Every fp32, bf16 and fp16
that the model asks for becomes fp64: a `.float()` inside of a norm would hide errors below 1e-7.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ditq_converters.hooks import hooked

WHOLE = {
    F.linear: "linear",
    F.scaled_dot_product_attention: "sdpa",
    F.layer_norm: "layer_norm",
    torch.layer_norm: "layer_norm",
    F.rms_norm: "rms_norm",
    torch.rms_norm: "rms_norm",
}
PARAMETERS = {
    "linear": ("input", "weight", "bias"),
    "sdpa": ("query", "key", "value", "attn_mask"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias"),
    "rms_norm": ("input", "normalized_shape", "weight"),
}
COPIES = frozenset({
    "_to_copy", "clone", "alias", "detach", "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "lift_fresh",
})  # fmt: skip
MOVES = COPIES | {
    "permute", "transpose", "t", "expand", "slice", "select", "split", "split_with_sizes", "chunk", "cat", "stack",
    "unbind", "flip", "repeat", "index_select", "index", "gather", "_reshape_alias", "as_strided", "roll", "narrow",
    "constant_pad_nd", "repeat_interleave", "movedim", "unfold", "native_dropout", "view_as",
}  # fmt: skip
WRITE = "write:"
IN_PLACE = {"add_": "add", "mul_": "mul", "div_": "div", "sub_": "sub"}
WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}


class Ref(int):
    """Index of a value, where an operation's argument was a tensor."""


@dataclass
class Op:
    """One operation.

    Attributes:
        index: position in the order they ran.
        name: of the aten packet, or `linear`, `sdpa`, `layer_norm`, `rms_norm`; `write:NAME` where it wrote to a view.
        func: what ran.
        args: positional arguments, tensors replaced by `Ref`.
        kwargs: keyword arguments likewise.
        inputs: the values it read.
        outputs: the values it made; None for outputs that are no tensors.
    """

    index: int
    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Ref] = field(default_factory=list)
    outputs: list[Ref | None] = field(default_factory=list)

    def get(self, name: str) -> Any:
        """The argument of that name of an operation that stayed whole."""
        position = PARAMETERS[self.name].index(name)
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    @property
    def data(self) -> list[Any]:
        """What a data movement moves: its first argument, a tensor or several."""
        first = self.args[0]
        return list(first) if isinstance(first, list | tuple) else [first]


@dataclass
class Value:
    """One tensor that an operation read or made.

    Attributes:
        tensor: itself.
        op: what made it; None for a leaf.
        parameter: name of the parameter it is.
        argument: name of the model's argument it came with.
        rewritten: a leaf only to us: something wrote to its memory through another tensor. These are the value it had
            before, then those that were written to its memory.
    """

    tensor: torch.Tensor
    op: Op | None = None
    parameter: str | None = None
    argument: str | None = None
    rewritten: tuple[int, ...] = ()

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.tensor.shape


class Graph:
    """What one forward did.

    Attributes:
        modules: name -> module of the model.
        ops: in the order they ran.
        values: every tensor that they read or made; an index into this list stands for each.
        calls: name of a linear whose weight was read -> its operations.
        linear_of: index of an operation -> name of that linear.
        called: linears whose module was called; others read the weight of one without calling it.
        outputs: values that the model returned.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Know the leaves."""
        self.modules = dict(model.named_modules())
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self.calls: dict[str, list[Op]] = {}
        self.linear_of: dict[int, str] = {}
        self.called: set[str] = set()
        self.outputs: set[int] = set()
        self._known: dict[int, tuple[int, int]] = {}  # id of a tensor -> its value, its version
        self._writes: dict[int, list[int]] = {}  # memory -> values that operations wrote to it
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        for name, argument in inputs.items():
            for leaf in tensors_in(argument):
                self.values[self.ref(leaf)].argument = name

    def ref(self, tensor: torch.Tensor, op: Op | None = None) -> Ref:
        """The value of a tensor; a new one if an operation made it, or if nobody has seen it."""
        seen = self._known.get(id(tensor))
        if op is None and seen is not None and seen[1] == tensor._version:
            return Ref(seen[0])
        parameter, rewritten = None, ()
        if op is None and seen is None:
            parameter = self._parameters.get(id(tensor))
        elif op is None and seen is not None:
            rewritten = (seen[0], *self._writes.get(_memory(tensor), ()))
        self.values.append(Value(tensor, op, parameter, rewritten=rewritten))
        self._known[id(tensor)] = (len(self.values) - 1, tensor._version)
        return Ref(len(self.values) - 1)

    def refs(self, arguments: Any) -> Any:
        """Arguments with `Ref` in place of tensors."""
        return tree_map(lambda x: self.ref(x) if isinstance(x, torch.Tensor) else x, arguments)

    def add(self, name: str, func: Any, refs: Any, out: Any) -> None:
        """Note an operation that has run; its arguments as `refs` gave them before."""
        op = Op(len(self.ops), name, func, *refs)
        op.inputs = [leaf for leaf in tree_flatten(refs)[0] if isinstance(leaf, Ref)]
        self.ops.append(op)
        leaves = tree_flatten(out)[0]
        op.outputs = [self.ref(x, op) if isinstance(x, torch.Tensor) else None for x in leaves]
        if name.startswith(WRITE):
            for value in op.outputs:
                if value is not None:
                    memory = _memory(self.values[value].tensor)
                    self._writes.setdefault(memory, []).append(value)

    def root(self, value: int) -> int:
        """Back through operations that only copy, cast or reshape everything at once."""
        op = self.values[value].op
        while op is not None and op.name in COPIES:
            value = op.args[0]
            op = self.values[value].op
        return value

    def finish(self, out: list[torch.Tensor]) -> None:
        """Find the linears and the outputs among what was noted."""
        self.outputs = {self._known[id(x)][0] for x in out if id(x) in self._known}
        for op in self.ops:
            if op.name != "linear":
                continue
            name, _, field_name = (
                self.values[self.root(op.get("weight"))].parameter or ""
            ).rpartition(".")
            if field_name == "weight":
                self.calls.setdefault(name, []).append(op)
                self.linear_of[op.index] = name

    def users(self) -> list[list[Op]]:
        """For every value, the operations that read it."""
        found: list[list[Op]] = [[] for _ in self.values]
        for op in self.ops:
            for value in op.inputs:
                found[value].append(op)
        return found


class Record(TorchDispatchMode):
    """Notes every aten operation."""

    supports_higher_order_operators = True

    def __init__(self, graph: Graph) -> None:
        """Note into `graph`."""
        super().__init__()
        self.graph, self.off = graph, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and note."""
        kwargs = kwargs or {}
        if self.off:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):  # flex attention and its like
            refs = self.graph.refs((args, {}))
            out = func(*args, **kwargs)
            self.graph.add("higher order", func, refs, out)
            return out
        name = func._overloadpacket.__name__
        if name == "addcmul" and kwargs.get("value", 1) == 1:  # as two operations
            mul, add = torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor
            product = self.__torch_dispatch__(mul, types, (args[1], args[2]))
            return self.__torch_dispatch__(add, types, (args[0], product))
        if func._schema.is_mutable:
            target = args[0] if args and isinstance(args[0], torch.Tensor) else None
            plain = target is not None and target._base is None
            name = IN_PLACE[name] if plain and name in IN_PLACE else WRITE + name
        refs = self.graph.refs((args, kwargs))
        out = func(*args, **kwargs)
        self.graph.add(name, func, refs, out)
        return out


class Wide(TorchFunctionMode):
    """Every floating point type is fp64; with a recorder, linears, attention and norms are noted whole."""

    def __init__(self, record: Record | None = None) -> None:
        """Note into the graph of `record`, if there is one."""
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run with wider types, and note."""
        args, kwargs = tree_map(_wider, (tuple(args), dict(kwargs or {})))
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        name, record = WHOLE.get(func), self.record
        if name is None or record is None or record.off:
            return func(*args, **kwargs)
        refs = record.graph.refs((args, kwargs))
        record.off = True
        try:
            out = func(*args, **kwargs)
        finally:
            record.off = False
        record.graph.add(name, func, refs, out)
        return out


def trace(model: nn.Module, inputs: dict[str, Any]) -> tuple[Graph, list[torch.Tensor]]:
    """Run a forward and note what it does.

    Args:
        model: in fp64.
        inputs: keyword arguments of its forward, floating point ones in fp64.

    Returns:
        The graph, and the output's tensors.
    """
    graph = Graph(model, inputs)
    with _calls_noted(graph):
        out = run_wide(model, inputs, Record(graph))
    graph.finish(out)
    return graph, out


def run_wide(
    model: nn.Module, inputs: dict[str, Any], record: Record | None = None
) -> list[torch.Tensor]:
    """A forward with every floating point type at fp64; the output's tensors, in order."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    eager = torch.compiler.set_stance("force_eager")  # no mode reaches into compiled flex attention
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), eager:
            torch.manual_seed(0)
            if record is None:
                with Wide():
                    return tensors_in(model(**inputs))
            with record, Wide(record):
                return tensors_in(model(**inputs))
    finally:
        torch.set_default_dtype(default)


def tensors_in(out: Any) -> list[torch.Tensor]:
    """The tensors of a nested output, in order."""
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _wider(leaf: Any) -> Any:
    return WIDER.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


def _calls_noted(graph: Graph) -> ExitStack:
    """Inside, linears that are called tell so."""

    def note(name: str) -> Any:
        return lambda module, args: graph.called.add(name)

    return hooked(
        module.register_forward_pre_hook(note(name))
        for name, module in graph.modules.items()
        if isinstance(module, nn.Linear)
    )
