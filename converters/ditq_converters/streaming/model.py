"""A float model without weights: a module of its blocks reads its tensors when it runs, and drops them after.

What lies outside the blocks is small and stays loaded. The rest of the converter asks here for tensors, so that it
need not know which kind of model it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from ditq_converters.streaming.source import FloatSource
from ditq_runtime.families import Family, family_of

ATTRIBUTE = "ditq_streamed"


@dataclass
class Streamed:
    """How a model without weights gets them.

    Attributes:
        source: the weights on disk.
        device: where a module's tensors go while it runs.
        memory_budget: bytes that work with the model may take; None: no limit.
        model_hash: of the weights, once it is known.
        staying: names of modules that have their weights for longer than a run.
    """

    source: FloatSource
    device: torch.device
    memory_budget: int | None = None
    model_hash: str | None = None
    staying: set[str] = field(default_factory=set)

    def load(self, module: nn.Module, prefix: str, recurse: bool = True) -> None:
        """Give a module its tensors."""
        self._assign(module, self.source.read(self._names(module, prefix, recurse)), prefix)

    def drop(self, module: nn.Module, prefix: str, recurse: bool = True) -> None:
        """Take them away again."""
        names = self._names(module, prefix, recurse)
        self._assign(module, {name: self.source.empty(name) for name in names}, prefix)

    def stays(self, name: str) -> bool:
        """Whether a module has its weights now, whoever runs it."""
        return any(f"{name}.".startswith(f"{one}.") for one in self.staying)

    def _names(self, module: nn.Module, prefix: str, recurse: bool) -> list[str]:
        """Of a module's tensors, those that are on disk: a linear that was exchanged has its own."""
        return [n for n in _names(module, prefix, recurse) if n in self.source.headers]

    def _assign(self, module: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
        local = {
            name.removeprefix(f"{prefix}."): tensor if tensor.is_meta else tensor.to(self.device)
            for name, tensor in tensors.items()
        }
        module.load_state_dict(local, strict=False, assign=True)


def open_streamed(source: FloatSource, memory_budget: int | None = None) -> nn.Module:
    """The model of a source, its blocks on meta, its other tensors loaded.

    Raises:
        ValueError: an unsupported class, or a tensor that is missing or of another shape.
    """
    with init_empty_weights():
        model: Any = getattr(diffusers, source.config["_class_name"]).from_config(source.config)
    family = family_of(type(model).__name__)
    source.check(model)
    nn.Module.to(model, source.dtype).requires_grad_(False).eval()  # its own `to` warns
    streamed = Streamed(source, torch.device("cpu"), memory_budget)
    setattr(model, ATTRIBUTE, streamed)
    blocks = tuple(f"{block}." for block in family.block_names(model))
    for name, module in model.named_modules():
        if not _names(module, name, recurse=False):
            continue
        if f"{name}.".startswith(blocks):
            _read_when_run(streamed, module, name)
        else:
            streamed.load(module, name, recurse=False)
    return model


def streamed_of(model: nn.Module) -> Streamed | None:
    """How a model gets its weights from disk; None for one that has them."""
    return getattr(model, ATTRIBUTE, None)


def tensors_of(
    model: nn.Module, prefix: str = "", in_order: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(full name, tensor) of a model, or of its module `prefix`, one at a time.

    Args:
        model: streamed or not.
        prefix: name of a module; the model itself by default.
        in_order: of their names, instead of the order of `state_dict`.
    """
    start = f"{prefix}." if prefix else ""
    tensors, streamed = model.get_submodule(prefix).state_dict(), streamed_of(model)
    for name in sorted(tensors) if in_order else tensors:
        full = f"{start}{name}"
        yield full, tensors[name] if streamed is None else streamed.source.read([full])[full]


def move(model: nn.Module, device: torch.device) -> None:
    """Run a streamed model on `device`."""
    streamed = streamed_of(model)
    assert streamed is not None
    streamed.device = device
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)


@contextmanager
def weights_of(model: nn.Module, block: str) -> Iterator[nn.Module]:
    """The block of that name, with its weights inside the `with`."""
    module, streamed = model.get_submodule(block), streamed_of(model)
    if streamed is None:
        yield module
        return
    streamed.load(module, block)
    streamed.staying.add(block)
    try:
        yield module
    finally:
        streamed.staying.discard(block)
        streamed.drop(module, block)


def copy_of(model: nn.Module) -> nn.Module:
    """A copy whose modules can be exchanged; it has the very tensors of the model, or reads them from the same disk."""
    streamed = streamed_of(model)
    if streamed is None:
        tensors = [*model.parameters(), *model.buffers()]
        return deepcopy(model, {id(tensor): tensor for tensor in tensors})
    copy = open_streamed(streamed.source, streamed.memory_budget)
    move(copy, streamed.device)
    return copy


def lend_weights(model: nn.Module, copy: nn.Module, block: str) -> None:
    """Give a block of a copy the weights that the model's has now; `drop_weights` takes them back."""
    streamed = streamed_of(copy)
    if streamed is not None:
        tensors = model.get_submodule(block).state_dict()
        copy.get_submodule(block).load_state_dict(tensors, strict=False, assign=True)
        streamed.staying.add(block)


def drop_weights(copy: nn.Module, block: str) -> None:
    """Take a block's float weights."""
    streamed = streamed_of(copy)
    if streamed is not None:
        streamed.staying.discard(block)
        streamed.drop(copy.get_submodule(block), block)


def passing_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a forward of a streamed model holds at once; 0 for one that has its weights."""
    streamed = streamed_of(model)
    if streamed is None:
        return 0
    size = streamed.source.size
    return max(
        sum(size(tensor) for tensor in _names(module, name, recurse=False))
        for name, module in model.named_modules()
    )


def largest_block(model: nn.Module, family: Family) -> int:
    """Bytes of the fp32 weights of the largest block."""
    blocks = (model.get_submodule(block) for block in family.block_names(model))
    return 4 * max(sum(p.numel() for p in block.parameters()) for block in blocks)


def _read_when_run(streamed: Streamed, module: nn.Module, name: str) -> None:
    def load(*_: Any) -> None:
        if not streamed.stays(name):
            streamed.load(module, name, recurse=False)

    def drop(*_: Any) -> None:
        if not streamed.stays(name):
            streamed.drop(module, name, recurse=False)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop, always_call=True)


def _names(module: nn.Module, prefix: str, recurse: bool = True) -> list[str]:
    """Full names of a module's stored tensors."""
    start = f"{prefix}." if prefix else ""
    if recurse:
        return [f"{start}{name}" for name in module.state_dict()]
    stored = [*module._parameters.items(), *module._buffers.items()]
    return [
        f"{start}{name}"
        for name, tensor in stored
        if tensor is not None and name not in module._non_persistent_buffers_set
    ]
