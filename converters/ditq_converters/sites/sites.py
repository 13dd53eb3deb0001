"""What the statistics say about the sites of one block, and what follows for its static ranges and groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from ditq_converters.calibrate.stats import CalibrationStats, StatisticsError
from ditq_converters.convert.bias_correction import SampledRows
from ditq_converters.convert.fold import Block, site_weight
from ditq_converters.convert.gptq import Feedback, error_feedback
from ditq_converters.convert.quantize import static_range
from ditq_converters.methods import METHODS, BlockTransform, SiteData, Transform, ranges
from ditq_converters.plan.recipe import Recipe
from ditq_runtime.families import AdaLN, BlockTable, OnTheFly, ValueRows

Ranges = dict[str, tuple[torch.Tensor, torch.Tensor]]


def site_data(
    table: BlockTable, block: str, linears: Block, recipe: Recipe, stats: CalibrationStats
) -> list[SiteData]:
    """The sites of a block that a recipe quantizes, with their statistics and original weights."""
    sites = []
    for site in table.sites:
        if all(recipe.keeps(f"{block}.{name}") for name in site.consumers):
            continue
        rows: torch.Tensor | None = None
        row_calls: tuple[int, ...] = ()
        if recipe.needs_rows:
            rows, row_calls = stats.rows(f"{block}.{site.name}")
        low, high = stats.ranges(f"{block}.{site.name}")
        weight = site_weight(linears, site)
        if low.shape[1] != weight.shape[1]:
            raise StatisticsError(
                f"{stats.folder}: {block}.{site.name} has {low.shape[1]} channels, and its linears read "
                f"{weight.shape[1]}; another ditq recorded it, calibrate again into a new folder"
            )
        sites.append(
            SiteData(
                site.name,
                low,
                high,
                weight=weight,
                foldable=not isinstance(site.producer, OnTheFly),
                grouped=isinstance(site.producer, AdaLN),
                rows=rows,
                row_calls=row_calls,
            )
        )
    return sites


def restrict(
    choice: BlockTransform, table: BlockTable, linears: Block, recipe: Recipe
) -> BlockTransform:
    """Take back what a method decided for channels that its sites' producers cannot absorb.

    Beyond the channels of V no shift is possible, and a factor only if the method leaves factors to the quantizer.
    """
    sites = dict(choice.sites)
    for site in table.sites:
        producer = site.producer
        if site.name in sites and isinstance(producer, ValueRows) and producer.rest is not None:
            width = len(linears[producer.values[0]].weight)
            smooth, shift = sites[site.name].smooth, sites[site.name].shift
            if shift is not None:
                shift = shift.clone()
                shift[:, width:] = 0
            if smooth is not None and not METHODS[recipe.method].on_the_fly:
                smooth = smooth.clone()
                smooth[width:] = 1
            sites[site.name] = Transform(smooth, shift)
    return BlockTransform(sites, choice.group_of_call)


@dataclass(frozen=True)
class Observed:
    """What calibration says about the linears of one block; consumer -> value, as far as a recipe asks for it.

    Attributes:
        act_range: static range (low, high) of its transformed input.
        feedback: error feedback of its transformed input.
        rows: makes the sampled rows of its transformed input, for one linear at a time.
    """

    act_range: Ranges
    feedback: dict[str, Feedback]
    rows: dict[str, Callable[[], SampledRows]]


def observe(
    table: BlockTable, sites: list[SiteData], choice: BlockTransform, recipe: Recipe
) -> Observed:
    """What the transformed sites say about the linears that read them."""
    consumers = {site.name: site.consumers for site in table.sites}
    return Observed(
        act_ranges(table, sites, choice, recipe) if recipe.activations == "static" else {},
        feedbacks(table, sites, choice, recipe),
        {
            name: partial(sampled_rows, site, choice, recipe)
            for site in sites
            for name in consumers[site.name]
        },
    )


def act_ranges(
    table: BlockTable, sites: list[SiteData], choice: BlockTransform, recipe: Recipe
) -> Ranges:
    """Consumer -> static range (low, high) of its transformed input."""
    consumers = {site.name: site.consumers for site in table.sites}
    only = METHODS[recipe.method].static_call
    calls = slice(None) if only is None else slice(only, only + 1)
    found: Ranges = {}
    for site in sites:
        transform = choice.sites.get(site.name, Transform())
        pair = static_range(
            site.minimum[calls], site.maximum[calls], transform, choice.group_of_call[calls]
        )
        if recipe.range_method != "minmax":
            rows = site.rows_after(transform, choice.group_of_call, only)
            pair = ranges.search(recipe.range_method, rows, *pair)
        found.update(dict.fromkeys(consumers[site.name], pair))
    return found


def feedbacks(
    table: BlockTable, sites: list[SiteData], choice: BlockTransform, recipe: Recipe
) -> dict[str, Feedback]:
    """Consumer -> error feedback of its transformed input, where a recipe rounds by it; readers share one."""
    if recipe.rounding != "gptq":
        return {}
    consumers = {site.name: site.consumers for site in table.sites}
    only = METHODS[recipe.method].static_call
    found: dict[str, Feedback] = {}
    for site in sites:
        transform = choice.sites.get(site.name, Transform())
        rows = site.rows_after(transform, choice.group_of_call, only)
        feedback = error_feedback(rows, centred=recipe.bias_correction)
        found.update(dict.fromkeys(consumers[site.name], feedback))
    return found


def sampled_rows(site: SiteData, choice: BlockTransform, recipe: Recipe) -> SampledRows:
    """The sampled rows of a transformed site, with their timestep groups."""
    transform, only = choice.sites.get(site.name, Transform()), METHODS[recipe.method].static_call
    return SampledRows(
        site.rows_after(transform, choice.group_of_call, only),
        site.groups_of_rows(choice.group_of_call, only),
    )


def group_bounds(timesteps: list[float], group_of_call: tuple[int, ...]) -> torch.Tensor:
    """Boundaries between timestep groups: midpoints of the timesteps on both sides.

    Args:
        timesteps: [T] of every call, noisiest first.
        group_of_call: [T] group of every call, rising.

    Returns:
        fp32 [G - 1], ascending timesteps; the last group of calls lies below the first boundary.

    Raises:
        StatisticsError: the timesteps do not fall strictly.
    """
    if any(later >= earlier for earlier, later in pairwise(timesteps)):
        raise StatisticsError(
            "timestep groups need timesteps that fall at every call; calibrate with ddim or ddpm"
        )
    edges = [i for i in range(1, len(timesteps)) if group_of_call[i] != group_of_call[i - 1]]
    middles = [(timesteps[i - 1] + timesteps[i]) / 2 for i in reversed(edges)]
    return torch.tensor(middles, dtype=torch.float32)
