"""One block, from float to packed: statistics -> transforms -> fold (exact) -> quantize (lossy)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.aim import Aim
from ditq_converters.convert.attention import static_scales
from ditq_converters.convert.bias_correction import corrected_bias
from ditq_converters.convert.fold import LinearTensors, block_linears, fold_block, stored_folds
from ditq_converters.convert.fold_producers import norm_tensors
from ditq_converters.convert.groups import by_timestep, group_bounds
from ditq_converters.convert.modulation import observe_modulation
from ditq_converters.convert.observed import Observed, observe
from ditq_converters.convert.prefix import Prefix
from ditq_converters.convert.quantize import quantize_linear, quantizer_tensors, store_table
from ditq_converters.convert.site_data import site_data
from ditq_converters.convert.transforms import decide
from ditq_converters.plan.entries import LinearPlan
from ditq_converters.plan.plan import Part
from ditq_runtime.families import BlockTable, Family
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
) -> PackedBlock:
    """One block: statistics -> transforms -> fold (exact) -> quantize (lossy).

    Args:
        model: the float transformer, with the weights of this block.
        family: of its class.
        block: its name.
        part: its entries of the plan.
        stats: of the model, where the plan needs some.
        before: the model up to here as it will be packed, where the plan aims at the float model's outputs.
    """
    table = family.block_tables(model)[block]
    linears = block_linears(model.get_submodule(block), table)
    data = site_data(table, block, linears, part, stats)
    choice = decide(table, linears, part, data)
    if stats is not None:
        choice = by_timestep(choice, stats.timesteps)
    in_quantizer = [name for name, site in part.sites.items() if site.place == "quantizer"]
    floats = [name for name in linears if not _is_integer(part, f"{block}.{name}")]
    left = fold_block(linears, table, choice.sites, in_quantizer, floats)
    biased = {f"{block}.{name}" for name, linear in linears.items() if linear.bias is not None}
    observed = observe(part, data, choice, biased)
    aim = None if before is None else Aim(before, block, table, linears, choice, in_quantizer)

    tensors, formats, quantizers = {}, {}, dict[str, dict[str, torch.Tensor]]()
    for name in as_they_run(table):
        linear = linears[name]
        full = f"{block}.{name}"
        if linear.bias is not None:
            linear.bias = linear.bias.flip(0)  # tables run by rising timestep, calls by falling
        if name in table.tables:
            stored = store_table(linear)
        elif name in table.norms:
            weight = model.get_parameter(f"{full}.weight")
            stored = norm_tensors(linear, weight.dtype)
        else:
            entry, known = part.linears[full], observed.get(full, Observed())
            if name in table.modulations:
                known = observe_modulation(model, entry, stats, choice.group_of_call)
            quantizer = quantizer_tensors(known.act_range, left.get(name))
            if aim is not None and entry.rounding == "aimed" and entry.is_integer:
                known = aim.observed(name, linear, entry.activations, quantizer)
            formats[full], stored = convert_linear(linear, entry, quantizer, known)
            if aim is not None:
                aim.finish(name, formats[full], stored, quantizer)
            if entry.is_integer:
                quantizers[entry.site.removeprefix(f"{block}.")] = quantizer
        tensors.update({f"{full}.{field}": tensor for field, tensor in stored.items()})
    if choice.num_groups > 1 and stats is not None:
        bounds = group_bounds(stats.timesteps, choice.group_of_call)
        tensors[f"{block}.{TIMESTEP_GROUPS}.bounds"] = bounds
    for kept in (quantizers, stored_folds(linears, table, choice.sites, in_quantizer)):
        for site, stored in kept.items():
            prefix = f"{block}.{SITES}.{site}"
            tensors |= {f"{prefix}.{field}": tensor for field, tensor in stored.items()}
    tensors |= static_scales(model, table, part, stats, choice)
    return PackedBlock(tensors, formats)


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
    final, stored = convert_linear(linear, entry, {}, known)
    return PackedBlock(
        {f"{name}.{field}": tensor for field, tensor in stored.items()}, {name: final}
    )


def convert_linear(
    linear: LinearTensors,
    entry: LinearPlan,
    quantizer: dict[str, torch.Tensor],
    observed: Observed,
) -> tuple[LayerFormat, dict[str, torch.Tensor]]:
    """One folded linear: its final format and its stored tensors; `quantizer` holds those of what it reads."""
    groups = 1 if linear.bias is None else linear.bias.shape[0]
    final = entry.layer_format(linear.bias is not None, groups)
    assert final is not None
    rounded = linear if observed.target is None else LinearTensors(observed.target, linear.bias)
    stored = quantize_linear(rounded, final, observed.feedback, entry.symmetric)
    if observed.rows is not None and final.bias:
        stored["bias"] = corrected_bias(linear, final, stored, quantizer, observed.rows())
    return final, stored


def _is_integer(part: Part, name: str) -> bool:
    return name in part.linears and part.linears[name].is_integer
