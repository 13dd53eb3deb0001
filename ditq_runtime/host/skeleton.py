"""Turn a diffusers transformer into the shape a scheme describes: packed linears, own AdaLN, one embedder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ditq_runtime.attention import install as attention_install
from ditq_runtime.attention.call_path import guard_values
from ditq_runtime.errors import CheckpointError
from ditq_runtime.families import BlockTable, Family, family_of
from ditq_runtime.families.sites import TIMESTEP_GROUPS
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.host.sites import install_sites
from ditq_runtime.layers.carrier import carry
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.modulation_table import ModulationTable
from ditq_runtime.layers.site import Site
from ditq_runtime.layers.timestep_freq import set_timestep_freq
from ditq_runtime.layers.timestep_groups import TimestepGroups


def install(model: nn.Module, scheme: Scheme, compute_dtype: torch.dtype) -> None:
    """Swap in what `scheme` lists, in place; the new tensors are uninitialized, on meta.

    Args:
        model: a float transformer of the scheme's architecture, usually on meta.
        scheme: what the checkpoint is.
        compute_dtype: dtype of activations between the layers.

    Raises:
        CheckpointError: the architecture differs, or a listed layer does not exist or is no linear.
    """
    check_architecture(model, scheme)
    family = family_of(scheme.architecture)
    tables = family.block_tables(model)
    wide = {
        f"{block}.{name}"
        for block, table in tables.items()
        if table.use_direct_multiplier is not None
        for name in table.modulations
    }
    for name in scheme.layers:
        _swap(model, name, scheme.format_of(name), compute_dtype, wide_output=name in wide)
    install_sites(model, scheme)
    grouped = []
    for name in dict.fromkeys([*tables, *(site.rpartition(".")[0] for site in scheme.sites)]):
        table = tables.get(name, BlockTable(()))  # discovery finds blocks that no name tells
        block = model.get_submodule(name)
        groups = _install_groups(name, block)
        _install_tables(block, table, groups)
        if table.use_direct_multiplier is not None:
            table.use_direct_multiplier(block)
        if groups is not None:
            grouped.append(name)
            if (
                table.use_direct_multiplier is None
            ):  # such a block does not look for its group itself
                block.register_forward_pre_hook(_find_group)
    if grouped:
        carry_timestep(model, scheme.timestep)
    for name, attention_format in scheme.attention.items():
        attention_install.install(model, name, attention_format)
    _guard_values(model, scheme)
    if scheme.shared_embedder:
        share_embedder(model, family)
    set_timestep_freq(model, scheme.timestep_freq)


def _guard_values(model: nn.Module, scheme: Scheme) -> None:
    """Blocks whose V carries a fold look at their processors."""
    for name, site in scheme.sites.items():
        block = name.rpartition(".")[0]
        if site.place == "value":
            inside = [producer.removeprefix(f"{block}.") for producer in site.producers]
            guard_values(model.get_submodule(block), inside)


def duplicate_embedders(model: nn.Module, scheme: Scheme) -> list[str]:
    """Prefixes of the embedder copies that a checkpoint with a shared embedder does not store."""
    family = family_of(scheme.architecture)
    return family.embedder_prefixes(model)[1:] if scheme.shared_embedder else []


def share_embedder(model: nn.Module, family: Family) -> None:
    """Make every block use the first block's embedder object."""
    first, *others = family.embedder_prefixes(model)
    for prefix in others:
        parent, _, leaf = prefix.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_submodule(first))


def has_shared_embedder(
    model: nn.Module,
    family: Family,
    tensors: Callable[[str], Mapping[str, torch.Tensor]] | None = None,
) -> bool:
    """Whether the embedders of all blocks are equal, bit for bit, so that one is enough.

    Args:
        model: a float transformer.
        family: its table.
        tensors: prefix of a module -> its tensors; default: from the model. Two modules are held at a time.
    """
    prefixes = family.embedder_prefixes(model)
    if len(prefixes) < 2:
        return False
    read = tensors or (lambda prefix: model.get_submodule(prefix).state_dict())
    first = read(prefixes[0])
    return all(
        torch.equal(tensor, first[name])
        for prefix in prefixes[1:]
        for name, tensor in read(prefix).items()
    )


def check_architecture(model: nn.Module, scheme: Scheme) -> None:
    """CheckpointError for a model of another class than the scheme was written for."""
    if type(model).__name__ != scheme.architecture:
        raise CheckpointError(
            f"scheme: written for {scheme.architecture}, but config.json asks for {type(model).__name__}"
        )


def _install_groups(name: str, block: nn.Module) -> TimestepGroups | None:
    """Give a block with grouped layers the module that finds its current group, and its layers the place to look."""
    counts = set[int]()
    for module in block.modules():
        if isinstance(module, QuantLinear):
            counts.add(module.format.groups)
        elif isinstance(module, Site):
            counts.add(max(module.format.quantizer_shifts, 1))
    counts.discard(1)
    if len(counts) > 1:
        raise CheckpointError(
            f"{name}: its layers and sites have {sorted(counts)} timestep groups, one number is needed"
        )
    if not counts:
        return None
    groups = TimestepGroups(counts.pop())
    setattr(block, TIMESTEP_GROUPS, groups)
    return groups


def carry_timestep(model: nn.Module, argument: str) -> None:
    """Let the forwards of a model with timestep groups carry their timestep; CheckpointError for no such argument."""
    try:
        carry(model, argument)
    except ValueError as error:
        raise CheckpointError(f"scheme: timestep: {error}") from error


def _find_group(block: nn.Module, args: object) -> None:
    getattr(block, TIMESTEP_GROUPS)()


def _install_tables(block: nn.Module, table: BlockTable, groups: TimestepGroups | None) -> None:
    """Put a block's own share of a shared modulation in a module that carries its fold."""
    for name in table.tables:
        parameter = block.get_parameter(name)
        delattr(block, name)
        module = ModulationTable(parameter.numel(), 1 if groups is None else groups.num_groups)
        setattr(block, name, module)


def _swap(
    model: nn.Module,
    name: str,
    layer_format: LayerFormat,
    compute_dtype: torch.dtype,
    wide_output: bool,
) -> None:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(
            f"{name}: listed in the scheme, but the model has no linear of that name"
        )
    packed = QuantLinear(
        linear.in_features,
        linear.out_features,
        layer_format,
        compute_dtype,
        wide_output=wide_output,
    )
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, packed)
