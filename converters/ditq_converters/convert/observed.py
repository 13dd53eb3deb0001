"""What calibration says about the linears of one block behind their transforms: static ranges, error feedback, rows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch

from ditq_converters.convert.bias_correction import SampledRows
from ditq_converters.convert.gptq import Feedback, error_feedback
from ditq_converters.convert.quantize import static_range
from ditq_converters.methods import BlockTransform, SiteData, Transform, ranges
from ditq_converters.plan.entries import SitePlan
from ditq_converters.plan.plan import Part

Range = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Observed:
    """What is known about one linear's input after its transform, as far as its entry asks for it.

    Attributes:
        act_range: static range (low, high); None: it has no static activations.
        feedback: how errors of columns spread; None: it is rounded to nearest.
        rows: makes the sampled rows; None: no bias is corrected.
        target: [N, K] fp64, what the codes should stand for; None: the folded weight.
    """

    act_range: Range | None = None
    feedback: Feedback | None = None
    rows: Callable[[], SampledRows] | None = None
    target: torch.Tensor | None = None


def observe(
    part: Part, data: list[SiteData], choice: BlockTransform, biased: Collection[str]
) -> dict[str, Observed]:
    """Full linear name -> what is known; readers of a site share it.

    Args:
        part: entries of the plan.
        data: what is known about the sites.
        choice: their transforms.
        biased: full names of the linears with a bias behind the fold: without one nothing takes a mean error back.
    """
    found = {}
    for site in data:
        entry = part.sites[site.name]
        readers = [reader for reader in part.readers_of(entry) if reader.is_integer]
        static = any(reader.activations == "static" for reader in readers)
        limits = act_range(entry, site, choice) if static else None
        rows = partial(sampled_rows, entry, site, choice)
        corrects = {r.name: r.bias_correction and r.name in biased for r in readers}
        centred = {corrects[r.name] for r in readers if r.rounding == "gptq"}  # aimed: see `aim`
        feedback = {flag: error_feedback(rows().x, centred=flag) for flag in centred}
        for reader in readers:
            found[reader.name] = Observed(
                limits if reader.activations == "static" else None,
                feedback[corrects[reader.name]] if reader.rounding == "gptq" else None,
                rows if corrects[reader.name] else None,
            )
    return found


def act_range(entry: SitePlan, site: SiteData, choice: BlockTransform) -> Range:
    """Static range (low, high) of a site's transformed input."""
    transform, only = choice.sites.get(site.name, Transform()), entry.only_call
    calls = slice(None) if only is None else slice(only, only + 1)
    pair = static_range(
        site.minimum[calls], site.maximum[calls], transform, choice.group_of_call[calls]
    )
    if entry.ranges == "minmax":
        return pair
    rows = site.rows_after(transform, choice.group_of_call, only)
    return ranges.search(entry.ranges, rows, *pair)


def sampled_rows(entry: SitePlan, site: SiteData, choice: BlockTransform) -> SampledRows:
    """The sampled rows of a transformed site, with their timestep groups."""
    transform, only = choice.sites.get(site.name, Transform()), entry.only_call
    return SampledRows(
        site.rows_after(transform, choice.group_of_call, only),
        site.groups_of_rows(choice.group_of_call, only),
    )
