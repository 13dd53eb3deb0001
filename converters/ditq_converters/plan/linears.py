"""What happens to one linear: its format, or why it stays float."""

from __future__ import annotations

from typing import Any

from torch import nn

import ditq_kernels as k
from ditq_converters.plan.entries import BEHIND, MODULATION, OUTSIDE, LinearPlan
from ditq_converters.plan.recipe import Recipe
from ditq_runtime.families import BlockTable, Family
from ditq_runtime.format.layer import GROUPED

KEPT = "kept float by choice"


def plan_reader(name: str, linear: nn.Linear, site: str, recipe: Recipe) -> LinearPlan:
    """A linear that reads a site: both operands become integers."""
    shape = _shape(linear)
    if recipe.keeps(name):
        return LinearPlan(name, shape, site, "fp32", reason=KEPT)
    weights, group, why = _weights(linear, recipe.weights, recipe.group)
    return LinearPlan(
        name, shape, site, weights, recipe.activations, group,
        recipe.symmetric_weights and weights == "w4g", recipe.rank, recipe.rounding,
        recipe.bias_correction, recipe.iterations, recipe.weight_range_method,
        why or f"integer weights and {recipe.activations} activations",
    )  # fmt: skip


def plan_modulation(
    name: str, linear: nn.Linear, table: BlockTable | None, recipe: Recipe
) -> LinearPlan:
    """A modulation linear, weight-only unless asked otherwise; without a table the final one, in 8 bits."""
    shape = _shape(linear)
    if recipe.keeps(name):
        return LinearPlan(name, shape, MODULATION, "fp32", reason=KEPT)
    if table is None:
        why = "weight-only, in 8 bits: no block follows; one row per sample"
        return LinearPlan(name, shape, MODULATION, "w8", reason=why, **_rounding(recipe))
    direct = table.use_direct_multiplier is not None
    activations = recipe.modulation_activations
    kind = "weight-only" if activations == "none" else f"input quantized, {activations}"
    what = f"{kind}; {'emits the AdaLN multiplier' if direct else 'one row per sample'}"
    weights, group, why = _weights(linear, recipe.modulation_weights, recipe.group)
    symmetric = recipe.symmetric_weights and weights == "w4g"
    return LinearPlan(
        name, shape, MODULATION, weights, activations, group, symmetric,
        reason=f"{what}; {why}" if why else what, **_rounding(recipe),
    )  # fmt: skip


def _rounding(recipe: Recipe) -> dict[str, Any]:
    """Of a modulation linear, whose inputs are exact: aimed is no more than gptq."""
    rounding = "gptq" if recipe.rounding in BEHIND else recipe.rounding
    return {
        "rounding": rounding,
        "bias_correction": recipe.bias_correction,
        "weight_ranges": recipe.weight_range_method,
    }


def plan_outside(name: str, linear: nn.Linear, family: Family) -> LinearPlan:
    """A linear that no block table lists."""
    return LinearPlan(name, _shape(linear), OUTSIDE, "as it is", reason=family.why_kept(name))


def _weights(linear: nn.Linear, weights: str, group_size: int) -> tuple[str, int | None, str]:
    """The weights that a width can have, their group size, and why they are not those that were asked for."""
    if weights not in GROUPED:
        return weights, None, ""
    width = linear.in_features
    try:
        found = k.resolve_group_size(width, group_size, one_group=weights == "w4g")
    except ValueError:
        return "w8", None, f"w8 instead of {weights}: no group of a multiple of 32 divides {width}"
    if found == group_size:
        return weights, found, ""
    return weights, found, f"groups of {found}: {group_size} does not divide its {width} inputs"


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features
