"""What every choice for a linear gains at the model's output, and the plan that spends a budget best.

The whole model is converted once for every rung of RUNGS, with the same transforms, and kept as linears that stand in
for packed ones in the float model (`convert.emulated`). Then one unit after another, the linears of a site or a
modulation, is taken from a better model into the smallest one, and the error of the model's output is measured on
replayed calls: at the output, because errors of single layers do not tell what they do to it. Noise of different units
adds up nearly, so gains are added, and the choices that gain most together are found exactly (`ladder`). What is
converted in the end is rounded anew.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ditq_converters.auto.budget import parse_budget
from ditq_converters.auto.float_sites import FloatSite, best_float_sites, with_float_sites
from ditq_converters.auto.ladder import Choice, Ladder, Unit, check_least
from ditq_converters.auto.measured import bytes_of, check_room, emulated, noise
from ditq_converters.calibrate.known_sites import know_sites
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.prefix import Prefix
from ditq_converters.plan.entries import MODULATION, LinearPlan
from ditq_converters.plan.make import plan_of
from ditq_converters.plan.plan import Plan
from ditq_converters.plan.recipe import Recipe
from ditq_converters.progress import progress_bar
from ditq_converters.sites.find import family_for
from ditq_runtime.calls.parts import transformer_of

BEST = {
    "method": "osplus",
    "alpha": 0.35,  # less than usual: coarse weights can take little of what is hard to round
    "activations": "token_asym",
    "rounding": "aimed",
    "bias_correction": True,
    "kept_dtype": "bf16",
}


RUNGS: tuple[dict[str, Any], ...] = (  # what a unit can be stored as, the smallest first
    {"weights": "w4p"},
    {"weights": "w4p", "group_size": 32},
    {"weights": "w8", "alpha": 0.65},  # fine weights can take more
)
DATA_FREE: dict[str, Any] = {  # the best without any calibration
    "method": "linear",
    "group_size": 32,
    "kept_dtype": "bf16",
}
DECIDED = ("weights", "group_size")  # by a rung, whatever was asked for


def auto_plan(
    pipe: Any,
    stats: CalibrationStats,
    budget: str = "smallest",
    *,
    float_sites: int = 0,
    quiet: bool = False,
    inputs: dict[str, Any] | None = None,
    **choices: Any,
) -> Plan:
    """The plan with the least error whose checkpoint fits into a budget.

    Args:
        pipe: a diffusers pipeline, or its transformer alone.
        stats: of this model, with sampled rows and calls to replay.
        budget: see `budget.parse_budget`.
        float_sites: how many sites may keep float activations, where int8 costs the model's output most; their readers
            have 8-bit weights, and their products run in floating point.
        quiet: show no progress bar.
        inputs: as in `convert`.
        **choices: fields of `Recipe` that differ from BEST; `weights` is decided here.

    Returns:
        A plan whose entries say what was chosen, what it gained and cost, and what better choices would.

    Raises:
        ValueError: a budget that cannot be read, or that even 4 bits exceed; a model that cannot be run or converted.
        StatisticsError: the statistics lack what the search needs.
    """
    model = transformer_of(pipe)
    most = parse_budget(budget, model)
    stats.check_model(model)
    know_sites(model, stats)
    if most:
        ladder = climb(model, stats, quiet=quiet, inputs=inputs, most=most, **choices)
    else:
        ladder = ends(model, stats, quiet=quiet, inputs=inputs, **choices)
    plan = ladder.plan(most)
    if not float_sites:
        return plan
    chosen = best_float_sites(model, plan, stats, float_sites, quiet=quiet, inputs=inputs)
    if most:  # what the larger weights take is left out before
        plan = ladder.plan(most - _growth(model, ladder.low, chosen))
    return with_float_sites(plan, chosen)


def _growth(model: nn.Module, low: Plan, chosen: list[FloatSite]) -> int:
    """Bytes that sites with float activations take beyond the smallest plan's."""
    names = {entry.name for site in chosen for entry in site.entries}
    before = bytes_of(model, (entry for entry in low.linears if entry.name in names))
    return max(0, bytes_of(model, (e for site in chosen for e in site.entries)) - before)


def best(weights: str) -> dict[str, Any]:
    """Fields of the recipe that is best at equal bytes, for one form of weights."""
    rung = next((rung for rung in RUNGS if rung["weights"] == weights), {"weights": weights})
    return {**BEST, **rung}


def rungs(model: nn.Module, inputs: dict[str, Any] | None, choices: dict[str, Any]) -> list[Plan]:
    """All linears in one form, form by form; those that come out alike once."""
    made: list[Plan] = []
    for rung in RUNGS:
        plan = _rung(model, inputs, choices, rung)
        if plan not in made:
            made.append(plan)
    return made


def ends(
    model: nn.Module,
    stats: CalibrationStats | None = None,
    *,
    quiet: bool = False,
    inputs: dict[str, Any] | None = None,
    **choices: Any,
) -> Ladder:
    """The plans in 4 and in 8 bits, without any search; arguments as `auto_plan`."""
    low, high = (_rung(model, inputs, choices, rung) for rung in (RUNGS[0], RUNGS[-1]))
    return Ladder(low, high)


def _rung(
    model: nn.Module,
    inputs: dict[str, Any] | None,
    choices: dict[str, Any],
    rung: dict[str, Any],
) -> Plan:
    decided = {name: rung[name] for name in DECIDED if name in rung}
    return plan_of(model, Recipe.of(**{**BEST, **rung, **choices, **decided}), (), inputs)


@torch.no_grad()
def climb(
    pipe: Any,
    stats: CalibrationStats,
    *,
    quiet: bool = False,
    inputs: dict[str, Any] | None = None,
    most: int | None = None,
    **choices: Any,
) -> Ladder:
    """Measure what every choice gains, unit by unit; arguments and errors as `auto_plan`, `most` bytes if known."""
    model = transformer_of(pipe)
    low, *better = rungs(model, inputs, choices)
    family, found = family_for(model, inputs), units(model, low, better)
    check_room(model, family, low, better)
    smallest, nbytes = emulated(model, family, low, stats)
    if most:
        check_least(most, nbytes)
    wanted = smallest.outputs(finished=False)
    base = noise(wanted, smallest.outputs(finished=True))
    gains: dict[tuple[str, int], float] = {}
    with progress_bar("trying choices", len(better) * len(found), quiet=quiet) as advance:
        for number, plan in enumerate(better, 1):
            other, _ = emulated(model, family, plan, stats)
            for unit in found:
                _exchange(smallest, other, unit.linears)
                left = noise(wanted, smallest.outputs(finished=True))
                gains[unit.name, number] = 1 - left / base if base else 0.0
                _exchange(smallest, other, unit.linears)
                advance()
    measured = (
        replace(
            unit,
            choices=tuple(
                replace(choice, gain=gains.get((unit.name, number), 0.0))
                for number, choice in enumerate(unit.choices)
            ),
        )
        for unit in found
    )
    return Ladder(low, better[-1], tuple(measured), nbytes)


def units(model: nn.Module, low: Plan, better: list[Plan]) -> list[Unit]:
    """What can be stored in several ways: the readers of each site, and each modulation.

    Args:
        model: the float model.
        low: all in the smallest form.
        better: all in larger ones.
    """
    members: dict[str, list[LinearPlan]] = {}
    entries = [{entry.name: entry for entry in plan.linears} for plan in better]
    sites = [{site.name: site for site in plan.sites} for plan in (low, *better)]
    for entry in low.linears:
        if entry.weights != entries[-1][entry.name].weights:
            name = entry.name if entry.site == MODULATION else entry.site
            members.setdefault(name, []).append(entry)
    found = []
    for name, smallest in members.items():
        forms = [tuple(smallest), *(tuple(of[e.name] for e in smallest) for of in entries)]
        sizes = [bytes_of(model, form) for form in forms]
        choices = (
            Choice(form, size - sizes[0], site=of.get(name))
            for form, size, of in zip(forms, sizes, sites, strict=True)
        )
        found.append(Unit(name, tuple(choices)))
    return found


def _exchange(one: Prefix, other: Prefix, linears: tuple[str, ...]) -> None:
    """Swap linears between two copies; a second call swaps them back."""
    for name in linears:
        mine, theirs = one.seen.get_submodule(name), other.seen.get_submodule(name)
        one.finish(name, theirs)
        other.finish(name, mine)
