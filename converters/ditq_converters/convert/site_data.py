"""What the statistics and the float weights say about the sites of one block."""

from __future__ import annotations

from dataclasses import replace

import torch

from ditq_converters.calibrate.stats import CalibrationStats, StatisticsError
from ditq_converters.convert.fold import Block, site_weight
from ditq_converters.methods import METHODS, Quantizers, SiteData
from ditq_converters.plan.entries import LinearPlan, SitePlan, needs_rows
from ditq_converters.plan.plan import Part
from ditq_runtime.families import BlockTable


def site_data(
    table: BlockTable,
    block: str,
    linears: Block,
    part: Part,
    stats: CalibrationStats | None,
    every: bool = False,
) -> list[SiteData]:
    """The sites whose entries, or whose readers' entries, are carried out by statistics.

    Args:
        table: of the block.
        block: its name.
        linears: its float linears.
        part: the block's entries of the plan.
        stats: of the model; None: nothing needs any.
        every: all sites with quantized readers and their sampled rows, needed or not.

    Raises:
        StatisticsError: a site is missing in them, damaged or of another width.
    """
    found = []
    for site in table.sites:
        entry = part.sites[site.name]
        readers = [r for r in part.readers_of(entry) if r.is_integer]
        if stats is None or not readers or not (every or _needed(entry, readers)):
            continue
        low, high = stats.ranges(f"{block}.{site.name}")
        weight = site_weight(linears, site)
        if low.shape[1] != weight.shape[1]:
            raise StatisticsError(
                f"{stats.folder}: {block}.{site.name} has {low.shape[1]} channels, and its linears read "
                f"{weight.shape[1]}; another ditq recorded it, calibrate again into a new folder"
            )
        sampled: torch.Tensor | None = None
        calls: tuple[int, ...] = ()
        if every or needs_rows(entry, [_unaimed(reader) for reader in readers]):
            sampled, calls = stats.rows(f"{block}.{site.name}")
        found.append(
            SiteData(
                site.name, low, high, weight, entry.shifts, sampled, calls, _quantizers(readers)
            )
        )
    return found


def _needed(entry: SitePlan, readers: list[LinearPlan]) -> bool:
    static = any(reader.activations == "static" for reader in readers)
    method = METHODS[entry.method].needs_statistics
    return method or static or needs_rows(entry, readers)


def _unaimed(reader: LinearPlan) -> LinearPlan:
    """A linear that is rounded by what replayed calls show, without what needs no sampled rows then."""
    if not reader.runs_model:
        return reader
    return replace(reader, rounding="nearest", bias_correction=False)


def _quantizers(readers: list[LinearPlan]) -> Quantizers:
    """What the readers round to; where they differ, what the one with most outputs does."""
    most = max(readers, key=lambda reader: reader.shape[0])
    return Quantizers(most.weights, most.group_size or 64, most.symmetric, most.activations)
