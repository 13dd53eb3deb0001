"""What happens to one attention module: quantized products, or why not."""

from __future__ import annotations

from torch import nn

from ditq_converters.methods import METHODS
from ditq_converters.plan.entries import AttentionPlan
from ditq_converters.plan.recipe import Recipe
from ditq_runtime.attention.install import unsupported
from ditq_runtime.families import Family

BY_CHOICE = "attention stays float by choice"
UNTOLD = (
    "no table says that its masks are of keys alone, which quantized attention needs; ask for it with --attention "
    "int8 or bf16"
)


def plan_attention(model: nn.Module, family: Family, recipe: Recipe) -> tuple[AttentionPlan, ...]:
    """One entry per attention module that the family table lists, or whose processor is recognised.

    Raises:
        ValueError: the recipe names quantized attention, and a module cannot have it. What a method has by default
            is left out there instead, with the reason.
    """
    names = family.attention_names(model)
    if recipe.attention not in (None, "none") and not names:
        raise ValueError(
            f"{family.architecture}: its attention does not run quantized yet; convert it with --attention none"
        )
    tables = family.block_tables(model).items()
    told = {f"{block}.{name}" for block, table in tables for name in table.attentions}
    return tuple(_one(model, name, name in told, recipe) for name in names)


def _one(model: nn.Module, name: str, told: bool, recipe: Recipe) -> AttentionPlan:
    wanted = recipe.attention_format
    if wanted is None or recipe.keeps(name):
        return AttentionPlan(name, reason=BY_CHOICE)
    reason = unsupported(model.get_submodule(name))
    if recipe.attention is None and not told:
        reason = reason or UNTOLD
    if not reason:
        calls = "all" if METHODS[recipe.method].static_call is None else "noisiest"
        why = f"Q and K in int8, P and V in {wanted.values}"
        return AttentionPlan(name, wanted.values, wanted.scales, calls, why)
    if recipe.attention is not None:
        raise ValueError(f"{name}: {reason}; convert it with --attention none")
    return AttentionPlan(name, reason=reason)
