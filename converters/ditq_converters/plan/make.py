"""Choices -> plan."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import nn

from ditq_converters.calibrate.known_sites import know_sites
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.models.gate import float_transformer
from ditq_converters.models.open import open_skeleton
from ditq_converters.plan.attention import plan_attention
from ditq_converters.plan.check import check_plan, check_statistics
from ditq_converters.plan.entries import LinearPlan, SitePlan
from ditq_converters.plan.linears import plan_modulation, plan_outside, plan_reader
from ditq_converters.plan.plan import Plan
from ditq_converters.plan.recipe import Recipe
from ditq_converters.plan.sites import plan_site
from ditq_converters.sites import family_for, family_or_row
from ditq_runtime.families import Family, get_linear
from ditq_runtime.surroundings import steady


@steady()
def make_plan(
    model: Any,
    stats: CalibrationStats | None = None,
    *,
    inputs: dict[str, Any] | None = None,
    set: Sequence[str] = (),
    **choices: Any,
) -> Plan:
    """Decide about every site, linear and attention of a model.

    Args:
        model: a diffusers pipeline, or its transformer alone; or a MODEL that `open_model` opens, whose weights are
            not read.
        stats: a calibration; the plan is checked against what it holds.
        inputs: keyword arguments of one forward of the transformer, to find the sites of a class without a table;
            None: those that `stats` were taken at, or made from its configuration.
        set: changes, each `PATTERN:field=value` as in `Plan.set_rule`, one after another.
        **choices: fields of `Recipe`, and options of its method. Without a method it is smoothquant, not the command's
            auto, which needs rows and whole calls of a calibration: for that take `auto_plan`.

    Returns:
        The plan, to read, to change, to save (`plan.file.write_plan`) and to convert with.

    Raises:
        ValueError: a choice out of its range; sites that cannot be found without `inputs`; a keep pattern or a change
            that matches nothing; attention that was asked for and cannot run quantized; entries that do not go
            together.
        StatisticsError: the statistics lack what the plan needs.
    """
    opened = (
        open_skeleton(str(model))
        if isinstance(model, str | Path)
        else float_transformer(model, "make_plan", False)
    )
    know_sites(opened, stats)
    plan = plan_of(opened, Recipe.of(**choices), set, inputs)
    if stats is not None:
        check_statistics(plan, stats)
    return plan


def plan_of(
    model: nn.Module,
    recipe: Recipe,
    rules: Sequence[str] = (),
    inputs: dict[str, Any] | None = None,
) -> Plan:
    """The plan of a recipe, changed by rules. Errors as `make_plan`."""
    family = family_or_row(model, inputs)
    plan = _plan(model, family, recipe)
    for rule in rules:
        plan.set_rule(rule)
    check_plan(plan, model, family)
    if plan.needs_statistics:
        family_for(model, inputs)  # a row is not enough: statistics are those of sites
    return plan


def _plan(model: nn.Module, family: Family, recipe: Recipe) -> Plan:
    _check_keep(model, family, recipe)
    sites: list[SitePlan] = []
    linears: list[LinearPlan] = []
    for block, table in family.block_tables(model).items():
        for site in table.sites:
            entry = plan_site(block, site, family, recipe)
            sites.append(entry)
            linears += [
                plan_reader(name, get_linear(model, name), entry.name, recipe)
                for name in entry.readers
            ]
        for name in (f"{block}.{name}" for name in table.modulations):
            linears.append(plan_modulation(name, get_linear(model, name), table, recipe))
    if family.final_modulation is not None:
        name = family.final_modulation
        linears.append(plan_modulation(name, get_linear(model, name), None, recipe))
    known = {entry.name for entry in linears}
    linears += [
        plan_outside(name, module, family)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in known
    ]
    attention = plan_attention(model, family, recipe)
    return Plan(family.architecture, tuple(sites), tuple(linears), attention, recipe.kept_dtype)


def _check_keep(model: nn.Module, family: Family, recipe: Recipe) -> None:
    """ValueError for a pattern of what stays float that names nothing."""
    names = [f"{b}.{n}" for b, t in family.block_tables(model).items() for n in t.linears]
    names += [family.final_modulation] if family.final_modulation is not None else []
    names += family.attention_names(model) if recipe.attention_format is not None else []
    for pattern in recipe.keep:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(
                f"--keep {pattern!r} matches none of the {len(names)} quantized modules; see `ditq inspect`"
            )
