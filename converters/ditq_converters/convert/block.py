"""One block, from float to packed: statistics -> transforms -> fold (exact) -> quantize (lossy)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.aim import Aim
from ditq_converters.convert.attention import static_scales
from ditq_converters.convert.bias_correction import corrected_bias
from ditq_converters.convert.emulated import Rounded
from ditq_converters.convert.fold import (
    Block,
    LinearTensors,
    block_linears,
    fold_block,
    norm_tensors,
    stored_folds,
)
from ditq_converters.convert.groups import by_timestep, group_bounds
from ditq_converters.convert.modulation import observe_modulation
from ditq_converters.convert.observed import Observed, observe
from ditq_converters.convert.prefix import Prefix
from ditq_converters.convert.quantize import quantize_linear, quantizer_tensors, store_table
from ditq_converters.convert.recheck import check_folds
from ditq_converters.convert.reconstruct import Tell, reconstruct
from ditq_converters.convert.site_data import site_data
from ditq_converters.convert.transforms import decide
from ditq_converters.methods import BlockTransform, SiteData, Transform
from ditq_converters.plan.entries import MODULATION, LinearPlan
from ditq_converters.plan.plan import Part
from ditq_runtime.families import BlockTable, Family
from ditq_runtime.families.placing import modulation_site
from ditq_runtime.families.sites import TIMESTEP_GROUPS, get_linear
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.site import SITES


@dataclass(frozen=True)
class PackedBlock:
    """One converted block, or the final modulation: full tensor name -> tensor, full layer name -> its final format."""

    tensors: dict[str, torch.Tensor]
    formats: dict[str, LayerFormat]


def convert_block(
    model: nn.Module,
    family: Family,
    block: str,
    part: Part,
    stats: CalibrationStats | None,
    before: Prefix | None = None,
    tell: Tell | None = None,
) -> PackedBlock:
    """One block: statistics -> transforms -> fold (exact) -> quantize (lossy).

    Args:
        model: the float transformer, with the weights of this block.
        family: of its class.
        block: its name.
        part: its entries of the plan.
        stats: of the model, where the plan needs some.
        before: the model up to here as it will be packed, where the plan aims at the float model's outputs.
        tell: as in `reconstruct`.
    """
    ready = prepare(model, family, block, part, stats)
    table, linears, choice = ready.table, ready.linears, ready.choice
    biased = {f"{block}.{name}" for name, linear in linears.items() if linear.bias is not None}
    observed = observe(part, ready.data, choice, biased)
    aim = None if before is None else ready.aim(before, block)

    tensors: dict[str, torch.Tensor] = {}
    rounded: dict[str, Rounded] = {}
    for name in as_they_run(table):
        linear = linears[name]
        full = f"{block}.{name}"
        if linear.bias is not None:
            linear.bias = linear.bias.flip(0)  # tables run by rising timestep, calls by falling
        if name in table.tables:
            tensors |= named(full, store_table(linear))
        elif name in table.norms:
            weight = model.get_parameter(f"{full}.weight")
            tensors |= named(full, norm_tensors(linear, weight.dtype))
        else:
            entry, known = part.linears[full], observed.get(full, Observed())
            if name in table.modulations:
                known = observe_modulation(model, entry, stats, choice.group_of_call)
            quantizer = quantizer_tensors(known.act_range, ready.left.get(name))
            if aim is not None and entry.runs_model and entry.is_integer:
                known = aim.observed(name, linear, entry.activations, quantizer)
            rounded[name] = convert_linear(linear, entry, quantizer, known)
            if aim is not None:
                aim.finish(name, rounded[name])
    if aim is not None:
        rounded |= learn(aim, part, rounded, tell)
    tensors |= ready.assembled(model, block, part, rounded, stats)
    if before is not None:
        before.leave()
    return PackedBlock(tensors, {f"{block}.{n}": one.layer_format for n, one in rounded.items()})


def learn(
    aim: Aim, part: Part, rounded: dict[str, Rounded], tell: Tell | None = None
) -> dict[str, Rounded]:
    """The linears of a block that are reconstructed together, learned."""
    entries = {name: part.linears[f"{aim.block}.{name}"] for name in rounded}
    chosen = {name: e for name, e in entries.items() if e.rounding == "reconstruct"}
    if not chosen:
        return {}
    iterations = max(entry.iterations for entry in chosen.values())
    return reconstruct(aim, {name: rounded[name] for name in chosen}, iterations, tell=tell)


def play_block(
    model: nn.Module,
    family: Family,
    block: str,
    part: Part,
    stats: CalibrationStats | None,
    before: Prefix,
    packed: PackedBlock,
) -> None:
    """Let what follows see a block that an earlier run converted; arguments as `convert_block`, and what it gave."""
    ready = prepare(model, family, block, part, stats)
    aim = ready.aim(before, block)
    for full, layer_format in packed.formats.items():
        name = full.removeprefix(f"{block}.")
        site = f"{block}.{SITES}.{aim.site.get(name, modulation_site(name))}"
        stored = fields_of(packed.tensors, full)
        aim.finish(name, Rounded(layer_format, stored, fields_of(packed.tensors, site)))


@dataclass(frozen=True)
class Ready:
    """A block whose transforms are chosen and folded.

    Attributes:
        table: of the block.
        linears: folded, fp64.
        data: what is known about its sites.
        choice: their transforms.
        in_quantizer: sites whose transform the quantizer applies, though a producer could.
        left: linear name -> what its quantizer applies.
    """

    table: BlockTable
    linears: Block
    data: list[SiteData]
    choice: BlockTransform
    in_quantizer: list[str]
    left: dict[str, Transform]

    def aim(self, before: Prefix, block: str) -> Aim:
        """The block on its way through rounding."""
        return Aim(before, block, self.table, self.linears, self.choice, self.in_quantizer)

    def assembled(
        self,
        model: nn.Module,
        block: str,
        part: Part,
        rounded: dict[str, Rounded],
        stats: CalibrationStats | None,
    ) -> dict[str, torch.Tensor]:
        """Full name -> tensor: of the linears, the sites, the timestep groups and the attention."""
        tensors: dict[str, torch.Tensor] = {}
        quantizers: dict[str, dict[str, torch.Tensor]] = {}
        for name, one in rounded.items():
            tensors |= named(f"{block}.{name}", one.stored)
            entry = part.linears[f"{block}.{name}"]
            if entry.is_integer:
                own = modulation_site(name) if entry.site == MODULATION else entry.site
                quantizers[own.removeprefix(f"{block}.")] = one.quantizer
        if self.choice.num_groups > 1 and stats is not None:
            bounds = group_bounds(stats.timesteps, self.choice.group_of_call)
            tensors[f"{block}.{TIMESTEP_GROUPS}.bounds"] = bounds
        folds = stored_folds(self.linears, self.table, self.choice.sites, self.in_quantizer)
        for kept in (quantizers, folds):
            for site, stored in kept.items():
                tensors |= named(f"{block}.{SITES}.{site}", stored)
        return tensors | static_scales(model, self.table, part, stats, self.choice)


def prepare(
    model: nn.Module, family: Family, block: str, part: Part, stats: CalibrationStats | None
) -> Ready:
    """Statistics -> transforms -> fold; arguments as `convert_block`."""
    table = family.block_tables(model)[block]
    linears = block_linears(model.get_submodule(block), table)
    data = site_data(table, block, linears, part, stats)
    choice = decide(table, linears, part, data)
    if stats is not None:
        choice = by_timestep(choice, stats.timesteps)
    in_quantizer = [name for name, site in part.sites.items() if site.place == "quantizer"]
    floats = [name for name in linears if not _is_integer(part, f"{block}.{name}")]
    left = fold_block(linears, table, choice.sites, in_quantizer, floats)
    module = model.get_submodule(block)
    check_folds(module, block, table, linears, choice.sites, in_quantizer, floats)
    return Ready(table, linears, data, choice, in_quantizer, left)


def named(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`prefix.NAME` -> tensor."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def fields_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """NAME -> tensor, of those that are called `prefix.NAME`."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def as_they_run(table: BlockTable) -> list[str]:
    """What a block converts, in the order in which it runs: modulation first, then site by site."""
    readers = [name for site in table.sites for name in site.consumers]
    return [*table.tables, *table.modulations, *table.norms, *readers]


def convert_final_modulation(
    model: nn.Module, name: str, part: Part, stats: CalibrationStats | None
) -> PackedBlock:
    """The linear that modulates the last norm: nothing folds into it."""
    linear, entry = LinearTensors.of(get_linear(model, name)), part.linears[name]
    known = observe_modulation(model, entry, stats, ())
    final = convert_linear(linear, entry, {}, known)
    return PackedBlock(named(name, final.stored), {name: final.layer_format})


def convert_linear(
    linear: LinearTensors,
    entry: LinearPlan,
    quantizer: dict[str, torch.Tensor],
    observed: Observed,
) -> Rounded:
    """One folded linear, rounded; `quantizer` holds the tensors of what it reads."""
    groups = 1 if linear.bias is None else linear.bias.shape[0]
    final = entry.layer_format(linear.bias is not None, groups)
    assert final is not None
    rounded = linear if observed.target is None else LinearTensors(observed.target, linear.bias)
    stored = quantize_linear(
        rounded,
        final,
        observed.feedback,
        entry.symmetric,
        entry.weight_ranges,
        weighed=entry.runs_model,
    )
    if observed.rows is not None and final.bias:
        stored["bias"] = corrected_bias(linear, final, stored, quantizer, observed.rows())
    return Rounded(final, stored, quantizer)


def _is_integer(part: Part, name: str) -> bool:
    return name in part.linears and part.linears[name].is_integer
