"""Find the sites of any transformer of diffusers: linears that read the very same tensor share one.

    family = find_sites(model, inputs)      # inputs: keyword arguments of one forward

The forward runs in fp64 on a small twin of the model (same configuration, two blocks per list, random parameters), so
that neither size nor weights matter. What is found and proven there holds for every block of the same linears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ditq_converters.progress import note
from ditq_converters.sites.folds import propose
from ditq_converters.sites.inputs import NoInputs, forward_inputs
from ditq_converters.sites.prove import Prover
from ditq_converters.sites.reasons import kept, why_float
from ditq_converters.sites.timestep import timestep_argument
from ditq_converters.sites.trace import Graph, trace
from ditq_converters.sites.twin import make_twin, widen
from ditq_converters.sites.usage import Usage
from ditq_runtime.families import FAMILIES, BlockTable, Family, OnTheFly, Site, family_of
from ditq_runtime.families.generic import block_lists

_FOUND: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()  # what was discovered before
UNTOLD = OnTheFly("what feeds it is not known yet", "-")


def family_for(model: nn.Module, inputs: dict[str, Any] | None = None) -> Family:
    """The family of a model: the table of its class, or what is discovered on it, once.

    Args:
        model: a transformer of diffusers; its weights are not read and may be on meta.
        inputs: keyword arguments of one forward; None: made from its configuration. Not read if this very model has
            been asked about before.

    Raises:
        ValueError: no transformer of diffusers, inputs that cannot be made, or a block that a forward does not reach.
    """
    known = family_of(type(model).__name__)
    if known.architecture in FAMILIES:
        return known
    if model not in _FOUND:
        _FOUND[model] = find_sites(model, inputs)
    return _FOUND[model]


def remember(model: nn.Module, family: Family) -> None:
    """Take what was discovered on a model elsewhere for what `family_for` finds on it."""
    _FOUND[model] = family


def family_or_row(model: nn.Module, inputs: dict[str, Any] | None = None) -> Family:
    """As `family_for`; where no inputs can be made, the row of every class: each linear a site of its own, no folds."""
    try:
        return family_for(model, inputs)
    except NoInputs as error:
        note(f"{error}; until then each linear is a site of its own and nothing folds")
        return family_of(type(model).__name__)


def timestep_carrier(model: Any, inputs: dict[str, Any]) -> str | None:
    """The argument that carries the timestep: as a packed model's scheme says, else as it was traced or a table says.

    Args:
        model: packed or float.
        inputs: keyword arguments of one forward, to trace a class that nobody has asked about before.
    """
    packed = getattr(model.config, "quantization_config", None)
    if packed is not None:
        return str(packed.scheme.timestep)
    return family_or_row(model, inputs).timestep_argument


def find_sites(model: nn.Module, inputs: dict[str, Any] | None = None) -> Family:
    """Discover sites and what folds exactly, also where the class has a table. Arguments, errors as `family_for`."""
    return discover(model, inputs).family


@dataclass(frozen=True)
class Discovery:
    """A discovered family, and the largest relative error of its folds in fp64; 0 where nothing folds."""

    family: Family
    error: float


def discover(model: nn.Module, inputs: dict[str, Any] | None = None) -> Discovery:
    """As `find_sites`, with what the proof measured."""
    found, twins = _traced(model, inputs)
    if not twins:
        raise ValueError(
            f"{type(model).__name__} has no list of repeated blocks with linears; ditq has nothing to quantize in it"
        )
    proposed = {
        name: propose(found.graph, name, _table(found.usage, name))
        for name in _blocks(found.usage, found.twin)
    }
    tables, error = Prover(found.twin, found.inputs, found.graph, found.out).prove(proposed)
    argument, why = timestep_argument(found.usage)
    of_model = {block: tables[of_twin] for block, of_twin in twins.items()}
    family = Family(
        type(model).__name__,
        lambda model: of_model,
        kept(found.usage, model, twins),
        timestep_argument=argument,
        why_no_timestep=why,
    )
    return Discovery(family, error)


@dataclass(frozen=True)
class Traced:
    """One forward of a twin: its inputs, what it did, what it gave, what its linears are for."""

    twin: nn.Module
    inputs: dict[str, Any]
    graph: Graph
    out: list[torch.Tensor]
    usage: Usage


def _traced(model: nn.Module, inputs: dict[str, Any] | None) -> tuple[Traced, dict[str, str]]:
    """A forward of a twin, and which of its blocks stands for each of the model's."""
    for full_depth in (False, True):
        try:
            twin = make_twin(model, full_depth)
            wide = widen(forward_inputs(twin) if inputs is None else inputs)
            graph, out = trace(twin, wide)
        except Exception as error:  # whatever a class raises that needs its depth
            if full_depth and inputs is None:
                raise
            if full_depth:
                raise ValueError(
                    f"{type(model).__name__}: a forward on these inputs failed: {type(error).__name__}: {error}"
                ) from error
            continue
        found = Traced(twin, wide, graph, out, Usage(graph, wide))
        twins = _twins(_blocks(found.usage, twin), twin, model)
        if twins is not None:
            return found, twins
    raise ValueError(
        f"{type(model).__name__}: its linears are not those of its configuration; give the model as it is loaded"
    )


def _blocks(usage: Usage, twin: nn.Module) -> list[str]:
    """Names of the repeated blocks; lists that see only one row per sample are embedders."""
    names = []
    for attribute, blocks in block_lists(twin):
        for index, _ in blocks.named_children():
            name = f"{attribute}.{index}"
            read = [x for x in usage.graph.calls if x.startswith(f"{name}.")]
            if not all(usage.per_sample(x) for x in read):
                names.append(name)
    return names


def _table(usage: Usage, block: str) -> BlockTable:
    """Sites of one block in the order they are read, before their producers are known, and modulation linears."""
    readers: dict[tuple[int, ...], list[str]] = {}
    timestep, _ = timestep_argument(usage)
    modulations = {}
    for name, calls in usage.graph.calls.items():
        inside = name.removeprefix(f"{block}.")
        if inside == name or why_float(usage, name, usage.graph.modules[name]) is not None:
            continue
        if usage.per_sample(name):
            modulations[inside] = 1
        else:
            same = tuple(op.get("input") for op in calls)
            readers.setdefault(same, []).append(inside)
    sites = tuple(
        Site(
            names[0].replace(".", "_"), tuple(names), UNTOLD, timed=_timed(usage, values, timestep)
        )
        for values, names in readers.items()
    )
    return BlockTable(sites, modulations)


def _timed(usage: Usage, values: tuple[int, ...], timestep: str | None) -> bool:
    return all(timestep in usage.depends[v] and not usage.scattered[v] for v in values)


def _twins(blocks: list[str], twin: nn.Module, model: nn.Module) -> dict[str, str] | None:
    """For every block of the model the twin's block that stands for it, one of the same linears; None if one has none.

    For the first block the first such, for every other the last.
    """
    found: dict[str, str] = {}
    in_twin = dict(block_lists(twin))
    for attribute, list_of_blocks in block_lists(model):
        alike = {
            f"{attribute}.{i}": _shapes(block) for i, block in in_twin[attribute].named_children()
        }
        if not set(blocks) & set(alike):
            continue  # an embedder
        for position, (index, block) in enumerate(list_of_blocks.named_children()):
            same = [n for n, shapes in alike.items() if n in blocks and shapes == _shapes(block)]
            if not same:
                return None
            found[f"{attribute}.{index}"] = same[0 if position == 0 else -1]
    return found


def _shapes(block: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name: (module.in_features, module.out_features)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
