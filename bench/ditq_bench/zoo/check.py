"""What every entry of the zoo promises, looked up in the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ditq_bench.zoo.tiny import Tiny, outputs


def block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """(name, list) of every list of blocks: modules of one class with at least two linears each."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            linears = [sum(isinstance(m, nn.Linear) for m in child.modules()) for child in module]
            if min(linears) >= 2:
                yield name, module


def problems(tiny: Tiny, model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """What is wrong with a model that `tiny` built: one sentence each, none if it keeps its promises."""
    found = [
        f"{name}: {len(blocks)} block" for name, blocks in block_lists(model) if len(blocks) < 2
    ]
    found += [
        f"{name}.{inner}: {linear.in_features} channels go in"
        for name, blocks in block_lists(model)
        for inner, linear in blocks.named_modules()
        if isinstance(linear, nn.Linear) and linear.in_features % 64 and linear.out_features > 1
    ]
    if not list(block_lists(model)):
        found.append("no list of blocks")
    names = [tiny.timestep] if isinstance(tiny.timestep, str) else list(tiny.timestep or ())
    taken = inspect.signature(model.forward).parameters
    found += [f"{name}: no such argument" for name in {*names, *inputs} if name not in taken]
    found += [f"{name}: not among the inputs" for name in names if name not in inputs]
    for parameter, tensor in model.named_parameters():
        if tensor.is_floating_point() and (not tensor.any() or (tensor == 1).all()):
            found.append(f"{parameter}: all zeros or all ones")
    results = outputs(model, inputs)
    if not results or not all(result.isfinite().all() for result in results):
        found.append("a result is missing or not finite")
    found += [f"a result of size {r.std():.1e}" for r in results if not 0.1 < r.std() < 10]
    return found


def same_bits(tiny: Tiny, model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether another model from the same seed has the same state and gives the same results."""
    again = tiny.build()
    states = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    results = zip(outputs(model, inputs), outputs(again, tiny.inputs(again)), strict=True)
    return all(torch.equal(a, b) for pairs in (states, results) for a, b in pairs)
