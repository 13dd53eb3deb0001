"""One block, from float to packed: statistics -> transforms -> fold (exact) -> quantize (lossy)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.attention import static_scales
from ditq_converters.convert.bias_correction import corrected_bias
from ditq_converters.convert.fold import LinearTensors, block_linears, fold_block, stored_folds
from ditq_converters.convert.quantize import quantize_linear, quantizer_tensors, store_table
from ditq_converters.methods import METHODS, BlockTransform
from ditq_converters.plan.layers import LayerPlan
from ditq_converters.plan.recipe import Recipe
from ditq_converters.sites.sites import Observed, group_bounds, observe, restrict, site_data
from ditq_runtime.families import Family
from ditq_runtime.families.sites import TIMESTEP_GROUPS, get_linear
from ditq_runtime.format.attention import AttentionFormat
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
    recipe: Recipe,
    stats: CalibrationStats | None,
    plans: dict[str, LayerPlan],
    attention: dict[str, AttentionFormat],
) -> PackedBlock:
    """One block: statistics -> transforms -> fold (exact) -> quantize (lossy)."""
    table = family.block_tables(model)[block]
    linears = block_linears(model.get_submodule(block), table)
    needed = stats if recipe.needs_statistics else None
    sites = [] if needed is None else site_data(table, block, linears, recipe, needed)
    transform = METHODS[recipe.method].transform
    choice = BlockTransform({}, ())
    if transform is not None and sites:
        choice = restrict(transform(sites, recipe.options), table, linears, recipe)
    observed = observe(table, sites, choice, recipe)
    smooth_inv = fold_block(linears, table, choice.sites)

    site_of = {name: site.name for site in table.sites for name in site.consumers}
    tensors, formats, quantizers = {}, {}, dict[str, dict[str, torch.Tensor]]()
    for name, linear in linears.items():
        if linear.bias is not None:
            linear.bias = linear.bias.flip(0)  # tables run by rising timestep, calls by falling
        if name in table.tables:
            stored = store_table(linear)
            tensors.update({f"{block}.{name}.{field}": tensor for field, tensor in stored.items()})
            continue
        planned = plans[f"{block}.{name}"].format
        assert planned is not None
        quantizer = quantizer_tensors(observed.act_range.get(name), smooth_inv.get(name))
        if name in smooth_inv and not planned.integer_gemm:  # it reads the input as it is
            linear.weight *= smooth_inv[name]
        final, stored = convert_linear(name, linear, planned, quantizer, observed, recipe)
        tensors.update({f"{block}.{name}.{field}": tensor for field, tensor in stored.items()})
        formats[f"{block}.{name}"] = final
        if final.integer_gemm:
            quantizers[site_of[name]] = quantizer
    if choice.num_groups > 1 and needed is not None:
        timesteps = [family.timestep_scale * t for t in needed.timesteps]
        bounds = group_bounds(timesteps, choice.group_of_call)
        tensors[f"{block}.{TIMESTEP_GROUPS}.bounds"] = bounds
    for kept in (quantizers, stored_folds(linears, table, choice.sites)):
        for site, stored in kept.items():
            prefix = f"{block}.{SITES}.{site}"
            tensors |= {f"{prefix}.{field}": tensor for field, tensor in stored.items()}
    if needed is not None:
        module = model.get_submodule(block)
        tensors |= static_scales(module, block, table, attention, recipe, needed, choice)
    return PackedBlock(tensors, formats)


def convert_final_modulation(model: nn.Module, planned: LayerPlan) -> PackedBlock:
    """The linear that modulates the last norm: quantized as it is, nothing folds into it."""
    assert planned.format is not None
    linear = LinearTensors.of(get_linear(model, planned.name))
    stored = quantize_linear(linear, planned.format)
    tensors = {f"{planned.name}.{field}": tensor for field, tensor in stored.items()}
    return PackedBlock(tensors, {planned.name: planned.format})


def convert_linear(
    name: str,
    linear: LinearTensors,
    planned: LayerFormat,
    quantizer: dict[str, torch.Tensor],
    observed: Observed,
    recipe: Recipe,
) -> tuple[LayerFormat, dict[str, torch.Tensor]]:
    """One folded linear: its final format and its stored tensors; `quantizer` holds those of what it reads."""
    groups = 1 if linear.bias is None else linear.bias.shape[0]
    final = replace(planned, groups=groups, bias=linear.bias is not None)
    feedback = observed.feedback.get(name)
    stored = quantize_linear(linear, final, feedback, recipe.symmetric_weights)
    if recipe.bias_correction and name in observed.rows and final.integer_gemm and final.bias:
        rows = observed.rows[name]()
        stored["bias"] = corrected_bias(linear, final, stored, quantizer, rows)
    return final, stored
