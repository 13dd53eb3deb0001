"""Which producer of a block could absorb the transform of each of its sites; `prove.py` has the last word."""

from __future__ import annotations

from dataclasses import replace

import torch

from ditq_converters.sites.carriers import Carrier, Walk
from ditq_converters.sites.trace import MOVES, Graph
from ditq_converters.sites.usage import ACTIVATIONS
from ditq_runtime.families import (
    BlockTable,
    NormWeights,
    OnTheFly,
    Producer,
    ProductRows,
    Site,
    ValueRows,
)

NORM_FIELDS = {"weight", "bias"}


def propose(graph: Graph, block: str, table: BlockTable) -> BlockTable:
    """A table whose sites have the producers that their dataflow suggests.

    Sites that read mixtures of the same values become one; any other producer serves one site or none.
    """
    walk = Walk(graph)
    sites = _merged([replace(s, producer=_producer(walk, block, s)) for s in table.sites])
    return replace(table, sites=tuple(sites))


def on_the_fly(graph: Graph, block: str, site: Site) -> OnTheFly:
    """Why no producer of a site absorbs anything, from what made its input."""
    value = graph.calls[f"{block}.{site.consumers[0]}"][0].get("input")
    op = graph.values[graph.root(value)].op
    while op is not None and op.name in MOVES and not isinstance(op.args[0], list | tuple):
        op = graph.values[op.args[0]].op
    if op is not None and op.name in ACTIVATIONS:
        return OnTheFly(
            f"its input is the output of {op.name.upper()}, which no factor passes through", "G"
        )
    made = "nothing in the model" if op is None else f"`{op.name}`"
    return OnTheFly(f"its input is made by {made}, into which no factor folds exactly", "X", True)


def _producer(walk: Walk, block: str, site: Site) -> Producer:
    calls = walk.graph.calls[f"{block}.{site.consumers[0]}"]
    why = on_the_fly(walk.graph, block, site)
    if len(calls) > 1:
        return why
    carriers, carried = walk.carriers(calls[0].get("input"))
    if not carriers or not all(c.name.startswith(f"{block}.") for c in carriers):
        return why
    if not any(c.is_linear for c in carriers):
        return _norm(walk.graph, block, carriers) or why
    if not all(c.is_linear for c in carriers):
        return why
    if all(c.attended for c in carriers):
        return _values(block, carriers, carried) or why
    return _product(block, carriers, len(carried)) or why


def _norm(graph: Graph, block: str, carriers: list[Carrier]) -> NormWeights | None:
    """The weight, and the bias, of one norm, an entry for each channel."""
    owners = {c.name.rpartition(".")[0] for c in carriers}
    fields = {c.name.rpartition(".")[2] for c in carriers}
    if len(owners) > 1 or not fields <= NORM_FIELDS or "weight" not in fields:
        return None
    if not all(_in_order(c.channels) for c in carriers):
        return None
    (owner,) = owners
    own = {name for name, _ in graph.modules[owner].named_parameters(recurse=False)}
    return NormWeights(owner.removeprefix(f"{block}."), "bias" in fields) if own == fields else None


def _values(block: str, carriers: list[Carrier], carried: torch.Tensor) -> ValueRows | None:
    """All rows of every value projection, in the order of the first channels of the site."""
    widths = {len(c.channels) for c in carriers}
    if len(widths) > 1 or not all(_in_order(c.channels) for c in carriers):
        return None
    width = widths.pop()
    rest = None
    if width < len(carried):
        rest = "what stands beside the attention's output takes no factor"
    return ValueRows(tuple(c.name.removeprefix(f"{block}.") for c in carriers), rest)


def _product(block: str, carriers: list[Carrier], width: int) -> ProductRows | None:
    """Neighbouring rows of one linear, one for each channel."""
    if len(carriers) > 1:
        return None
    channels = carriers[0].channels
    rows = (channels >= 0).nonzero().flatten()
    if len(rows) != width or not _in_order(channels[rows]) or int(rows[-1] - rows[0]) + 1 != width:
        return None
    name = carriers[0].name.removeprefix(f"{block}.")
    return ProductRows(name, int(rows[0]), int(rows[-1]) + 1)


def _in_order(channels: torch.Tensor) -> bool:
    return bool(torch.equal(channels, torch.arange(len(channels))))


def _merged(sites: list[Site]) -> list[Site]:
    """One site for all that read mixtures of the same values."""
    found: list[Site] = []
    for site in sites:
        same = next((i for i, s in enumerate(found) if _mix_alike(s, site)), None)
        if same is None:
            found.append(site)
            continue
        first = found[same]
        streams = (*(first.streams or first.consumers[:1]), site.consumers[0])
        found[same] = replace(first, consumers=first.consumers + site.consumers, streams=streams)
    return found


def _mix_alike(first: Site, second: Site) -> bool:
    a, b = first.producer, second.producer
    if not isinstance(a, ValueRows) or not isinstance(b, ValueRows):
        return False
    return set(a.values) == set(b.values) and a.rest is None and b.rest is None
