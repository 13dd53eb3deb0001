"""What every entry of the zoo promises, looked up in the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ditq_bench.zoo.pipe import Pipe
from ditq_bench.zoo.tiny import Tiny, outputs, quiet


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
    for name in names:
        if name in inputs and not _depends(model, inputs, name, results):
            found.append(f"{name}: another one changes nothing")
    found += [f"a result of size {r.std():.1e}" for r in results if not 0.1 < r.std() < 10]
    return found


def _depends(model: nn.Module, inputs: dict[str, Any], name: str, results: list) -> bool:
    """Whether half of a timestep gives other results."""
    half = inputs[name] / 2 if inputs[name].is_floating_point() else inputs[name] // 2
    return any(
        not torch.equal(a, b)
        for a, b in zip(results, outputs(model, {**inputs, name: half}), strict=True)
    )


def same_bits(tiny: Tiny, model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether another model from the same seed has the same state and gives the same results."""
    again = tiny.build()
    states = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    results = zip(outputs(model, inputs), outputs(again, tiny.inputs(again)), strict=True)
    return all(torch.equal(a, b) for pairs in (states, results) for a, b in pairs)


def pipe_problems(pipe: Pipe) -> list[str]:
    """What is wrong with a pipeline: each call must run every transformer, give finite latents and its own ones."""
    built = pipe.build()
    found = []
    results = []
    for call in pipe.calls:
        result, ran = watch(built, call, pipe.transformers)
        found += [f"{name} did not run" for name in pipe.transformers if not ran[name]]
        results.append(result)
    if not all(result.isfinite().all() for result in results):
        found.append("a result is not finite")
    if torch.equal(*results):
        found.append("both calls give the same")
    if not torch.equal(results[0], sample(pipe.build(), pipe.calls[0])):
        found.append("equal seeds give different bits")
    return found


def watch(
    pipe: Any, call: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[torch.Tensor, dict[str, int]]:
    """(what one call gives, how often each of the components ran)."""
    ran = dict.fromkeys(names, 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            ran[name] += 1

        return getattr(pipe, name).register_forward_pre_hook(hook)

    hooks = [count(name) for name in names]
    result = sample(pipe, call)
    for hook in hooks:
        hook.remove()
    return result, ran


def sample(pipe: Any, call: Mapping[str, Any]) -> torch.Tensor:
    """What one call gives: latents where the pipeline can be asked for them, with a fixed seed."""
    more = {"generator": torch.Generator().manual_seed(0), "return_dict": False}
    if "output_type" in inspect.signature(pipe.__call__).parameters:
        more["output_type"] = "latent"
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some pipelines draw without their generator, too
        result = pipe(**{**more, **call})[0]
    return result if isinstance(result, torch.Tensor) else torch.from_numpy(np.asarray(result))
