"""Quantized attention: which modules of a block get it, and their static scales from the calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

import ditq_kernels as k
from ditq_converters.calibrate.stats import CalibrationStats, StatisticsError
from ditq_converters.methods import METHODS, BlockTransform, Transform, ranges
from ditq_converters.plan.recipe import Recipe
from ditq_converters.progress import note
from ditq_runtime.attention.install import unsupported
from ditq_runtime.families import BlockTable, Family, ValueRows
from ditq_runtime.format.attention import CORE, AttentionFormat


@dataclass(frozen=True)
class AttentionPlan:
    """What happens to one attention module.

    Attributes:
        name: module name.
        format: None if it stays float.
        reason: why it stays float; empty otherwise.
    """

    name: str
    format: AttentionFormat | None
    reason: str = ""


def plan_attention(model: nn.Module, family: Family, recipe: Recipe) -> list[AttentionPlan]:
    """One entry per attention module that the family table lists.

    Raises:
        ValueError: the recipe names quantized attention, and a module cannot have it. What a method has by default
            is left out there instead, with the reason.
    """
    plans = []
    wanted = recipe.attention_format
    for name in family.attention_names(model):
        if wanted is None:
            plans.append(AttentionPlan(name, None, "the recipe leaves attention float"))
        elif recipe.keeps(name):
            plans.append(AttentionPlan(name, None, "kept float by --keep"))
        else:
            reason = unsupported(model.get_submodule(name))
            if reason and recipe.attention is not None:
                raise ValueError(f"{name}: {reason}; convert it with --attention none")
            plans.append(AttentionPlan(name, None if reason else wanted, reason))
    if recipe.attention not in (None, "none") and not plans:
        raise ValueError(
            f"{family.architecture}: its attention does not run quantized yet; convert it with --attention none"
        )
    return plans


def attention_formats(
    model: nn.Module, family: Family, recipe: Recipe, quiet: bool = True
) -> dict[str, AttentionFormat]:
    """Module name -> format of the attention that a conversion quantizes; tells what a default leaves float."""
    plans = plan_attention(model, family, recipe)
    left = [plan for plan in plans if plan.format is None and not recipe.keeps(plan.name)]
    if recipe.attention_format is not None and left:
        note(f"{left[0].name}: its attention stays float: {left[0].reason}", quiet)
    return {plan.name: plan.format for plan in plans if plan.format is not None}


def static_scales(
    block: nn.Module,
    prefix: str,
    table: BlockTable,
    formats: dict[str, AttentionFormat],
    recipe: Recipe,
    stats: CalibrationStats,
    choice: BlockTransform,
) -> dict[str, torch.Tensor]:
    """Full tensor name -> scale fp32 [H], symmetric, of the operands that the static formats of a block store.

    V is what the attention sees: after the shift and the factor that its projection absorbs for the output
    projection. Q and K absorb nothing.

    Args:
        block: of the float transformer.
        prefix: its name.
        table: its table.
        formats: of the whole model.
        recipe: of the conversion.
        stats: with the ranges of Q, K and V.
        choice: what the method decided for the block.

    Raises:
        StatisticsError: the statistics lack Q, K and V.
    """
    only = METHODS[recipe.method].static_call
    calls = slice(None) if only is None else slice(only, only + 1)
    scales = {}
    for module in table.attentions:
        name, attn = f"{prefix}.{module}", cast("Any", block.get_submodule(module))
        stored = formats[name].tensors(attn.heads) if name in formats else {}
        if stored and not stats.has_attention:
            raise StatisticsError(
                f"{stats.folder}: holds no ranges of Q, K and V; run `ditq calibrate MODEL --out NEW_FOLDER` and "
                "pass it with --stats, or convert with --attention-scales token or --attention none"
            )
        for field, (_, (heads,)) in stored.items():
            operand = field[0]
            low, high = (side[calls] for side in stats.ranges(f"{name}.{operand}"))
            if operand == "v":
                folded = _of_values(table, f"{module}.to_v", choice, low.shape[1])
                low, high = ranges.after(low, high, folded, choice.group_of_call[calls])
            absmax = torch.maximum(low.abs(), high.abs()).amax(0)  # [H * D]
            scales[f"{name}.{CORE}.{field}"] = k.symmetric_scale(absmax.view(heads, -1).amax(1))
    return scales


def _of_values(table: BlockTable, value: str, choice: BlockTransform, width: int) -> Transform:
    """The transform that a value projection of `width` rows absorbs: that of the site behind the attention."""
    for site in table.sites:
        if isinstance(site.producer, ValueRows) and value in site.producer.values:
            transform = choice.sites.get(site.name, Transform())
            smooth, shift = transform.smooth, transform.shift
            return Transform(
                None if smooth is None else smooth[:width],
                None if shift is None else shift[:, :width],
            )
    return Transform()
