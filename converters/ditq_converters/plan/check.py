"""A plan against the model it is for, and against statistics: one sentence that names the entry."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

import ditq_kernels as k
from ditq_converters.calibrate.stats import CalibrationStats, StatisticsError
from ditq_converters.methods import METHODS
from ditq_converters.methods.base import SHIFTS
from ditq_converters.plan.entries import MODULATION, OUTSIDE, LinearPlan, SitePlan
from ditq_converters.plan.plan import Plan
from ditq_converters.plan.sites import places_of, shifts_at
from ditq_runtime.attention.install import unsupported
from ditq_runtime.families import Family, Site
from ditq_runtime.families.placing import homes_of
from ditq_runtime.format.layer import GROUPED

AGAIN = "make the plan again with `ditq plan`"


def check_plan(plan: Plan, model: nn.Module, family: Family) -> None:
    """Refuse a plan that a model cannot have.

    Raises:
        ValueError: another architecture, an entry too many or too few, a fact of the model that differs, or choices
            that do not go together.
    """
    if plan.architecture != family.architecture:
        raise ValueError(
            f"plan: is for a {plan.architecture}, this model is a {family.architecture}; {AGAIN}"
        )
    tables = family.block_tables(model)
    sites = {f"{block}.{site.name}": site for block, t in tables.items() for site in t.sites}
    _same_names("site", [entry.name for entry in plan.sites], sites)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    _same_names("linear", [entry.name for entry in plan.linears], linears)
    site_of = homes_of(model, family)
    site_of |= dict.fromkeys(family.modulation_names(model), MODULATION)
    for linear in plan.linears:
        _check_linear(linear, linears[linear.name], site_of.get(linear.name, OUTSIDE))
        if linear.name == family.final_modulation and linear.is_integer:
            raise ValueError(
                f"plan: {linear.name}: stands in no block, so it has weights alone; leave activations out"
            )
    readers = plan.readers()
    for site in plan.sites:
        _check_site(site, sites[site.name], family, readers[site.name])
    for block in tables:
        _check_groups([s for s in plan.sites if s.name.startswith(f"{block}.")], block)
    _same_names("attention", [a.name for a in plan.attention], family.attention_names(model))
    for attention in plan.attention:
        reason = unsupported(model.get_submodule(attention.name))
        if attention.format is not None and reason:
            raise ValueError(f"plan: {attention.name}: {reason}; give it values none")


def check_statistics(plan: Plan, stats: CalibrationStats | None) -> None:
    """Refuse statistics that lack what a plan needs.

    Raises:
        ValueError: it needs some, and there are none.
        StatisticsError: they hold no sampled rows, or no ranges of Q, K and V, and the plan needs them.
    """
    if stats is None:
        if plan.needs_statistics:
            raise ValueError(
                f"convert: {_who_needs(plan)} needs statistics; run `ditq calibrate` first and pass them"
            )
        return
    check_groups(plan, len(stats.timesteps), "the statistics hold")
    if plan.needs_operands and not stats.has_attention:
        raise StatisticsError(
            f"{stats.folder}: holds no ranges of Q, K and V; run `ditq calibrate MODEL --out NEW_FOLDER` and "
            "pass it with --stats, or convert with --attention-scales token or --attention none"
        )
    if plan.needs_rows and not stats.has_rows:
        raise StatisticsError(
            f"{stats.folder}: holds no sampled rows; calibrate into a new folder with --rows 64"
        )


def differing_schedules(plan: Plan, stats: CalibrationStats | None) -> str | None:
    """A sentence where a method over time does not see the timesteps as they were met."""
    methods = {site.method for site in plan.sites if METHODS[site.method].over_time}
    met = stats.differing_timesteps if methods and stats is not None else 0
    if not met or stats is None:
        return None
    return (
        f"its inputs have different schedules; {' and '.join(sorted(methods))} orders their {met} timesteps by noise "
        f"and takes neighbours together, as {stats.calls}"
    )


def check_groups(plan: Plan, calls: int, source: str) -> None:
    """Refuse more timestep groups than `calls` of a run, of which `source` says where they come from."""
    for site in plan.sites:
        groups = site.options.get("num_groups") or 1
        if groups > calls:
            raise ValueError(
                f"{site.name}: {groups} timestep groups, but {source} {calls} calls; take at most that many"
            )


def _who_needs(plan: Plan) -> str:
    for site in plan.sites:
        if METHODS[site.method].needs_statistics:
            return f"{site.name}: method {site.method}"
    for linear in plan.linears:
        if linear.activations == "static":
            return f"{linear.name}: static activations"
        if linear.needs_rows:
            what = "bias correction" if linear.bias_correction else f"rounding {linear.rounding}"
            return f"{linear.name}: {what}"
    return "attention with static scales"


def _same_names(kind: str, planned: list[str], there: Iterable[str]) -> None:
    there = set(there)
    for name in planned:
        if name not in there:
            raise ValueError(f"plan: {name}: the model has no such {kind}; {AGAIN}")
    missing = sorted(there - set(planned))
    if missing:
        raise ValueError(f"plan: {missing[0]}: this {kind} of the model is missing; {AGAIN}")


def _check_site(entry: SitePlan, site: Site, family: Family, readers: list[LinearPlan]) -> None:
    block = entry.name.removesuffix(f".{site.name}")
    expected = tuple(f"{block}.{name}" for name in site.consumers)
    if entry.readers != expected:
        raise ValueError(
            f"plan: {entry.name}: its readers are {', '.join(expected)}, got {', '.join(entry.readers)}"
        )
    places = places_of(site)
    if entry.place not in places:
        raise ValueError(
            f"plan: {entry.name}: place must be one of {', '.join(places)}, got {entry.place!r}"
        )
    shifts = shifts_at(site, entry.place, family)
    if SHIFTS.index(entry.shifts) > SHIFTS.index(shifts):
        raise ValueError(
            f"plan: {entry.name}: shifts can be {shifts} at most where its transform goes to {entry.place!r}, got "
            f"{entry.shifts!r}"
        )
    if METHODS[entry.method].over_time and family.timestep_argument is None:
        raise ValueError(
            f"plan: {entry.name}: method {entry.method} follows the timestep, and {family.why_no_timestep}; take a "
            "method that does not"
        )
    kinds = sorted({reader.activations for reader in readers if reader.is_integer})
    if len(kinds) > 1:
        raise ValueError(
            f"plan: {entry.name}: its readers share one quantizer and must have the same activations, got "
            f"{' and '.join(kinds)}; set them for all with '{entry.name}:activations={kinds[0]}'"
        )
    if entry.ranges != "minmax" and kinds not in (["static"], []):
        raise ValueError(
            f"plan: {entry.name}: ranges {entry.ranges} is for static activations, got {kinds[0]}"
        )


def _check_linear(entry: LinearPlan, linear: nn.Linear, site: str) -> None:
    shape = (linear.out_features, linear.in_features)
    for field, planned, there in (("shape", entry.shape, shape), ("site", entry.site, site)):
        if planned != there:
            raise ValueError(
                f"plan: {entry.name}: its {field} is {there} in the model, got {planned}; {AGAIN}"
            )
    if (entry.weights == "as it is") != (site == OUTSIDE):
        raise ValueError(
            f"plan: {entry.name}: weights 'as it is' is for linears outside the blocks and only for them; take fp32 "
            f"to keep one float, got {entry.weights!r}"
        )
    if entry.runs_model and (site == MODULATION or not entry.is_integer):
        raise ValueError(
            f"plan: {entry.name}: rounding {entry.rounding} is for linears that read a site; take gptq"
        )
    if entry.needs_rows and not entry.is_integer and site != MODULATION:
        raise ValueError(
            f"plan: {entry.name}: rounding by rows and bias correction need quantized activations, got "
            f"{entry.activations!r}"
        )
    if entry.weights in GROUPED and not _divides(entry):
        raise ValueError(
            f"plan: {entry.name}: group_size {entry.group_size} does not divide its {shape[1]} inputs as "
            f"{entry.weights} needs it; take weights w8 or another group size"
        )


def _divides(entry: LinearPlan) -> bool:
    size, one_group = entry.group_size, entry.weights == "w4g"
    try:
        return size == k.resolve_group_size(entry.shape[1], int(size or 0), one_group=one_group)
    except (ValueError, TypeError):
        return False


def _check_groups(sites: list[SitePlan], block: str) -> None:
    """All sites of a block switch between timestep groups together."""
    over_time = [site for site in sites if METHODS[site.method].over_time]
    for site in over_time[1:]:
        if (site.method, site.options) != (over_time[0].method, over_time[0].options):
            raise ValueError(
                f"plan: {site.name}: a block has one set of timestep groups; give it the method and options of "
                f"{over_time[0].name}, or a method that does not follow the timestep"
            )
