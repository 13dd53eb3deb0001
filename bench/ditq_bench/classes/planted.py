"""Salient channels, planted into a class by the exact inverse of what smoothing folds: can smoothing undo them?

Every site with a fold that was proven gets factors exp(N(0, 2)): its producer is multiplied by them, its readers'
columns are divided. The model's function stays, its activations are hard to quantize. Nothing is tuned.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq_bench.classes.row import Planted, relative, told
from ditq_bench.classes.subject import Subject, observe, run_all
from ditq_bench.zoo import quiet
from ditq_converters.convert.fold import LinearTensors, block_linears, fold_block
from ditq_converters.convert.story import convert
from ditq_converters.methods import Transform
from ditq_converters.plan.recipe import Recipe
from ditq_converters.sites.find import remember
from ditq_runtime.families import FAMILIES, BlockTable, Family, OnTheFly, Site, ValueRows

SEED, SIGMA = 0, 2.0


@torch.no_grad()
def planted(subject: Subject, folder: Path) -> Planted:
    """Plant, calibrate again, convert to W8A8 with and without smoothing, and run the smoothed one in bf16."""
    done = Planted()
    try:
        with quiet(), torch.compiler.set_stance("force_eager"):
            model: Any = copy.deepcopy(subject.model)
            done.sites = plant(model, subject.found.family)
            if subject.found.family.architecture not in FAMILIES:
                remember(model, subject.found.family)
            kept = list(subject.stats.replay())

            def run(its: nn.Module) -> None:
                for call in kept:
                    call.replay(its)

            stats = observe(model, folder, run)
            truth = run_all(model, subject.calls)
            linear = convert(model, Recipe.of(method="linear"), stats, quiet=True)
            done.linear = relative(run_all(linear, subject.calls), truth)
            packed, plain = folder.with_name("planted-packed"), folder.with_name("planted-float")
            smooth = convert(model, Recipe.of(method="smoothquant"), stats, packed, quiet=True)
            model.save_pretrained(plain)
            done.smoothquant = relative(run_all(smooth, subject.calls), truth)
            halves = [in_bf16(call) for call in subject.calls]
            truth = run_all(model, [in_fp32(call) for call in halves])
            done.bf16, done.float_bf16 = (
                relative(
                    run_all(type(model).from_pretrained(p, dtype=torch.bfloat16), halves), truth
                )
                for p in (packed, plain)
            )
    except Exception as error:
        done.failed = told(error)
    return done


def plant(model: nn.Module, family: Family) -> int:
    """Change a model in place; returns how many sites were planted."""
    generator, count = torch.Generator().manual_seed(SEED), 0
    for block, table in family.block_tables(model).items():
        module = model.get_submodule(block)
        linears = block_linears(module, table)
        transforms = {
            site.name: Transform(1 / _factors(site, linears, generator))
            for site in table.sites
            if not isinstance(site.producer, OnTheFly)
        }
        fold_block(linears, table, transforms)
        _write(module, table, linears)
        count += len(transforms)
    return count


def _factors(
    site: Site, linears: dict[str, LinearTensors], generator: torch.Generator
) -> torch.Tensor:
    """[K] fp64; 1 beyond the channels of V, which nothing that is there can multiply."""
    width = linears[site.consumers[0]].weight.shape[1]
    factors = (SIGMA * torch.randn(width, dtype=torch.float64, generator=generator)).exp()
    if isinstance(site.producer, ValueRows):
        factors[len(linears[site.producer.values[0]].weight) :] = 1
    return factors


def _write(module: nn.Module, table: BlockTable, linears: dict[str, LinearTensors]) -> None:
    for name, tensors in linears.items():
        target: Any = module.get_submodule(name)
        weight = tensors.weight[:, 0] if name in table.norms else tensors.weight
        target.weight.copy_(weight)
        if tensors.bias is not None:
            target.bias.copy_(tensors.bias[0])


def in_bf16(tree: Any) -> Any:
    """Arguments with every fp32 tensor in bf16."""
    return _cast(tree, torch.float32, torch.bfloat16)


def in_fp32(tree: Any) -> Any:
    """The same numbers in fp32."""
    return _cast(tree, torch.bfloat16, torch.float32)


def _cast(tree: Any, old: torch.dtype, new: torch.dtype) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.to(new) if tree.dtype == old else tree
    if isinstance(tree, dict):
        return {key: _cast(value, old, new) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_cast(value, old, new) for value in tree)
    return tree
