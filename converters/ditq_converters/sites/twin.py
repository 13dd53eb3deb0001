"""A small twin of a model: same configuration, two blocks in every list, random parameters away from 0 and 1, fp64.

One block per list would hide what blocks share. Parameters at 0 or 1, as constructors leave them, make paths idle: a
wrong fold would pass there.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils._pytree import tree_map

DEPTH = re.compile(r"layers|depth|blocks")  # names of configuration entries that count blocks
BLOCKS = 2


def make_twin(model: Any, full_depth: bool = False) -> nn.Module:
    """The twin of a model, whose weights are not read.

    Args:
        model: a transformer of diffusers, possibly on meta.
        full_depth: as many blocks as the model has.

    Returns:
        In eval mode, on the CPU.
    """
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    if not full_depth:
        config = {k: _shallow(k, v) for k, v in config.items()}
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        twin: nn.Module = type(model).from_config(config)
    generator = torch.Generator().manual_seed(0)
    for module in twin.modules():
        for name, parameter in module.named_parameters(recurse=False):
            drawn = _draw(name, parameter, module, generator)
            setattr(module, name, nn.Parameter(drawn, requires_grad=False))
    _tie(twin, model)
    return nn.Module.to(twin, torch.float64).eval()


def _tie(twin: nn.Module, model: nn.Module) -> None:
    """Parameters that are one in the model are one in its twin."""
    first: dict[int, str] = {}
    known = {name for name, _ in twin.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        owner, _, field = name.rpartition(".")
        if other != name and {name, other} <= known:
            setattr(twin.get_submodule(owner), field, twin.get_parameter(other))


def widen(inputs: Any) -> Any:
    """Inputs with every floating point tensor in fp64, on the CPU."""

    def wide(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.detach().cpu()
        if leaf.is_complex():
            return leaf.to(torch.complex128)
        return leaf.double() if leaf.is_floating_point() else leaf

    return tree_map(wide, inputs)


def _shallow(key: str, value: Any) -> Any:
    counts = isinstance(value, int) and not isinstance(value, bool) and DEPTH.search(key)
    return min(value, BLOCKS) if counts else value


def _draw(
    name: str, parameter: nn.Parameter, module: nn.Module, generator: torch.Generator
) -> torch.Tensor:
    """Matrices of standard deviation fan_in^-0.5; factors in 1 +- [0.1, 0.4]; all else in +- [0.05, 0.45]."""
    shape = parameter.shape
    if parameter.dim() > 1 and name == "weight" and not isinstance(module, nn.Embedding):
        fan_in = shape[1:].numel()
        return torch.randn(shape, generator=generator, dtype=torch.float64) * fan_in**-0.5
    if parameter.dim() > 2:  # one matrix [in, out] per expert
        return torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-2] ** -0.5
    sign = torch.randint(2, shape, generator=generator) * 2.0 - 1
    size = torch.rand(shape, generator=generator, dtype=torch.float64)
    if name == "weight" and not isinstance(module, nn.Embedding):
        return 1 + sign * (0.1 + 0.3 * size)
    return sign * (0.05 + 0.4 * size)
