"""Simulate a published method: a float copy of the model whose linears round as the paper's, or its code's, do."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ditq_bench.simulated.granularity import fake_quantize_weight
from ditq_bench.simulated.linear import Groups, SimulatedLinear
from ditq_bench.simulated.profiles import Profile, profile_of
from ditq_bench.simulated.transforms import ACT_BITS, block_transform
from ditq_bench.simulated.weights import SimulatedWeight
from ditq_converters.calibrate.known_sites import know_sites
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.fold import LinearTensors, block_linears
from ditq_converters.convert.groups import by_timestep, group_bounds
from ditq_converters.convert.site_data import site_data
from ditq_converters.methods import BlockTransform, SiteData, Transform, ranges
from ditq_converters.plan.entries import MODULATION, QUANTIZED, SitePlan
from ditq_converters.plan.make import plan_of
from ditq_converters.plan.plan import Part
from ditq_converters.plan.recipe import Recipe
from ditq_converters.sites import family_for
from ditq_runtime.calls.parts import transformer_of
from ditq_runtime.families import BlockTable, get_linear

BITS = {"w8": 8, "w4p": 4, "w4g": 4}
Bounds = list[tuple[torch.Tensor, Groups]]  # per block: boundaries, and where its group is left


def simulate(
    pipe: Any,
    recipe: Recipe,
    profile: str,
    stats: CalibrationStats,
    granularity: str | None = None,
) -> nn.Module:
    """A float model that behaves like the method under a published profile. It saves nothing and speeds up nothing.

    Args:
        pipe: a diffusers pipeline, or its transformer alone; not changed.
        recipe: `method`, the bits of `weights`, `keep`, `lora_rank` and the method's options are read; the profile
            decides the rest.
        profile: `paper` or `code`, see `profiles`.
        stats: a calibration of this very model, with sampled rows.
        granularity: who shares a weight range, in place of the profile's.

    Returns:
        A transformer on the CPU, for evaluation.

    Raises:
        ValueError: the method has no such profile, or a granularity that does not fit.
        StatisticsError: the statistics are of another model, or hold no rows.
    """
    of = profile_of(recipe.method, profile)
    granularity = granularity or of.granularity_at(BITS[recipe.weights])
    model = transformer_of(pipe)
    stats.check_model(model)
    know_sites(model, stats)
    family, plan = family_for(model), plan_of(model, recipe)
    simulated = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    groups: Bounds = []
    for block, table in family.block_tables(model).items():
        part = plan.part(block)
        layers, found = _block(model, table, block, part, recipe, of, granularity, stats)
        groups.append(found)
        for name, layer in layers.items():
            simulated.get_submodule(block).set_submodule(name, layer)
        if of.modulation:
            _round_modulations(simulated, part, BITS[recipe.weights], of)
    simulated.register_forward_pre_hook(_group_finder(groups), with_kwargs=True)
    return simulated


def _block(
    model: nn.Module,
    table: BlockTable,
    block: str,
    part: Part,
    recipe: Recipe,
    profile: Profile,
    granularity: str,
    stats: CalibrationStats,
) -> tuple[dict[str, SimulatedLinear], tuple[torch.Tensor, Groups]]:
    """Name -> simulated linear, and the block's timestep groups."""
    linears = block_linears(model.get_submodule(block), table)
    sites = site_data(table, block, linears, part, stats, every=True)
    consumers = {site.name: site.consumers for site in table.sites}
    weights = {
        name: SimulatedWeight(
            linears[name].weight, profile, granularity, BITS[recipe.weights], recipe.rank
        )
        for site in sites
        for name in consumers[site.name]
    }
    readers = {site.name: [weights[name] for name in consumers[site.name]] for site in sites}
    choice = by_timestep(block_transform(part, profile, sites, readers), stats.timesteps)
    layers, index = {}, Groups()
    for site in sites:
        transform = choice.sites.get(site.name, Transform())
        limits = _static_range(part.sites[site.name], site, choice, profile)
        for name in consumers[site.name]:
            if part.linears[f"{block}.{name}"].weights in QUANTIZED:
                layers[name] = _layer(
                    linears[name], weights[name], transform, profile.act_rule, limits, index
                )
    return layers, (_bounds(stats, choice), index)


def _layer(
    linear: LinearTensors,
    weight: SimulatedWeight,
    transform: Transform,
    act_rule: str,
    limits: tuple[torch.Tensor, torch.Tensor] | None,
    index: Groups,
) -> SimulatedLinear:
    smooth, shift, bias = transform.smooth, transform.shift, linear.bias
    if shift is not None:
        term = shift @ linear.weight.T  # of the unquantized weight
        bias = (term if bias is None else bias + term).flip(0)  # tables run by rising timestep
        shift = shift.flip(0)
    factor = torch.ones(1, dtype=torch.float64) if smooth is None else smooth
    return SimulatedLinear(
        weight.final(factor), bias, smooth, shift, act_rule, ACT_BITS, limits, index
    )


def _static_range(
    entry: SitePlan, site: SiteData, choice: BlockTransform, profile: Profile
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The range of a site's transformed input; None where every call has its own."""
    if profile.activations != "static_tensor":
        return None
    transform, only = choice.sites.get(site.name, Transform()), entry.only_call
    calls = slice(None) if only is None else slice(only, only + 1)
    groups = choice.group_of_call
    pair = ranges.minmax(
        *ranges.after(site.minimum[calls], site.maximum[calls], transform, groups[calls])
    )
    return ranges.search(profile.range_method, site.rows_after(transform, groups, only), *pair)


def _round_modulations(simulated: nn.Module, part: Part, bits: int, profile: Profile) -> None:
    """Round the weights of a block's AdaLN linears in place, one range a row."""
    for name, entry in part.linears.items():
        if entry.site == MODULATION and entry.weights in QUANTIZED:
            weight = get_linear(simulated, name).weight
            rounded = fake_quantize_weight(
                weight.double(), "per_out_channel", bits, profile.weight_rule
            )
            weight.copy_(rounded)


def _bounds(stats: CalibrationStats, choice: BlockTransform) -> torch.Tensor:
    if choice.num_groups == 1:
        return torch.empty(0)
    return group_bounds(stats.timesteps, choice.group_of_call)


def _group_finder(groups: Bounds) -> Any:
    """A forward pre-hook of the transformer that tells every block the group of each sample."""

    def find(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"].reshape(-1).float().contiguous()
        for bounds, index in groups:
            index.value = torch.bucketize(timestep, bounds)

    return find
