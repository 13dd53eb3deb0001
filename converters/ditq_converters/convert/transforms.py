"""What the methods decide for one block, within what its sites can take."""

from __future__ import annotations

import json

from ditq_converters.convert.fold import Block
from ditq_converters.methods import METHODS, BlockTransform, SiteData, Transform
from ditq_converters.plan.plan import Part
from ditq_runtime.families import BlockTable, ValueRows


def decide(table: BlockTable, linears: Block, part: Part, data: list[SiteData]) -> BlockTransform:
    """Each method transforms the sites that the plan gives it.

    Args:
        table: of the block.
        linears: its float linears.
        part: its entries of the plan.
        data: what is known about its sites.

    Returns:
        Site name -> transform, with one set of timestep groups for the block.

    Raises:
        ValueError: a method chose other timestep groups than one before it, or a shift that a site cannot take.
    """
    same: dict[tuple[str, str], list[SiteData]] = {}
    for site in data:
        entry = part.sites[site.name]
        if entry.transforms:
            same.setdefault((entry.method, json.dumps(entry.options)), []).append(site)
    sites: dict[str, Transform] = {}
    groups = (0,) * len(data[0].minimum) if data else ()
    for (method, _), members in same.items():
        transform = METHODS[method].transform
        assert transform is not None
        choice = transform(members, part.sites[members[0].name].method_options)
        sites |= choice.sites
        groups = _agreed(groups, choice.group_of_call, method, members[0].name)
    return BlockTransform(_within(table, linears, part, sites), groups)


def _agreed(
    ours: tuple[int, ...], theirs: tuple[int, ...], method: str, site: str
) -> tuple[int, ...]:
    if not any(theirs) or theirs == ours:
        return ours
    if any(ours):
        raise ValueError(
            f"convert: {site}: method {method} has other timestep groups than the method before it; give the sites "
            "of a block one method that follows the timestep"
        )
    return theirs


def _within(
    table: BlockTable, linears: Block, part: Part, sites: dict[str, Transform]
) -> dict[str, Transform]:
    """Take back what was decided for channels beyond those of V: shifts, and factors unless the quantizer has them."""
    found = dict(sites)
    for site in table.sites:
        producer, entry = site.producer, part.sites[site.name]
        if site.name not in sites or not isinstance(producer, ValueRows) or not producer.rest:
            continue
        width = len(linears[producer.values[0]].weight)
        smooth, shift = sites[site.name].smooth, sites[site.name].shift
        if shift is not None:
            shift = shift.clone()
            shift[:, width:] = 0
        if smooth is not None and entry.place == "value":
            smooth = smooth.clone()
            smooth[width:] = 1
        found[site.name] = Transform(smooth, shift)
    return found
