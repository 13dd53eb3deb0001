"""Which linears take 8 bits where a budget does not let all: those that lower the error most per byte.

The whole model is converted twice, in 4 and in 8 bits, with the same transforms; both are kept as linears that stand in
for packed ones in the float model (`convert.emulated`). Then one unit after another, the linears of a site or a
modulation, is taken from the 8-bit model into the 4-bit one, and the error of the model's output is measured on
replayed calls: at the output, because errors of single layers do not tell what they do to it. Noise of different units
adds up nearly, so the gains are ranked per byte and taken while they fit. What is converted in the end is rounded anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from ditq_converters.auto.budget import linear_bytes, parse_budget
from ditq_converters.calibrate.known_sites import know_sites
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.jobs import Job
from ditq_converters.convert.prefix import Prefix
from ditq_converters.convert.story import convert_in_memory
from ditq_converters.plan.entries import MODULATION, OUTSIDE, LinearPlan
from ditq_converters.plan.make import plan_of
from ditq_converters.plan.plan import Plan
from ditq_converters.plan.recipe import Recipe
from ditq_converters.progress import progress_bar
from ditq_converters.sites.find import family_for
from ditq_runtime.calls.parts import transformer_of
from ditq_runtime.families import Family

CALLS = 8  # replayed calls that judge a unit, evenly over those that were kept
BEST = {
    "method": "osplus",
    "activations": "token_asym",
    "rounding": "aimed",
    "bias_correction": True,
    "kept_dtype": "bf16",
}


@dataclass(frozen=True)
class Unit:
    """Linears that take 8 bits together.

    Attributes:
        name: of their site, or of the modulation.
        eight: their entries in the 8-bit plan.
        cost: bytes that 8 bits cost more than 4.
    """

    name: str
    eight: tuple[LinearPlan, ...]
    cost: int

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names."""
        return tuple(entry.name for entry in self.eight)


@dataclass(frozen=True)
class Ladder:
    """The plans of one model from all in 4 bits to all in 8.

    Attributes:
        low: all in 4 bits.
        high: all in 8 bits.
        units: what can take 8 bits by itself.
        gains: unit -> share of the noise of the 4-bit model that its 8 bits take away.
        nbytes: of the 4-bit checkpoint's tensors.
    """

    low: Plan
    high: Plan
    units: tuple[Unit, ...] = ()
    gains: dict[str, float] = field(default_factory=dict)
    nbytes: int = 0

    def plan(self, most: int | None) -> Plan:
        """The plan for so many bytes; 0: the smallest; None: the largest.

        8 bits go to the units that gain most per byte, as long as they fit.
        """
        if not most:
            return self.high if most is None else self.low
        room, entries = most - self.nbytes, {entry.name: entry for entry in self.low.linears}
        for unit in sorted(self.units, key=lambda unit: -self.gains[unit.name] / unit.cost):
            gain = self.gains[unit.name]
            takes = gain > 0 and unit.cost <= room
            room -= unit.cost if takes else 0
            bits = "8 bits" if takes else "4 bits"
            why = f"auto: {bits}; 8 take away {gain:.1%} of the noise for {unit.cost:,} bytes"
            for eight in unit.eight:
                entry = eight if takes else entries[eight.name]
                entries[entry.name] = replace(entry, reason=why)
        return replace(self.low, linears=tuple(entries.values()))


def auto_plan(
    pipe: Any,
    stats: CalibrationStats,
    budget: str = "smallest",
    *,
    quiet: bool = False,
    inputs: dict[str, Any] | None = None,
    **choices: Any,
) -> Plan:
    """The plan with the least error whose checkpoint fits into a budget.

    Args:
        pipe: a diffusers pipeline, or its transformer alone.
        stats: of this model, with sampled rows and calls to replay.
        budget: see `budget.parse_budget`. A budget that even 4 bits exceed gives the smallest plan.
        quiet: show no progress bar.
        inputs: as in `convert`.
        **choices: fields of `Recipe` that differ from BEST; `weights` is decided here.

    Returns:
        A plan whose entries say what 8 bits would have gained, or did.

    Raises:
        ValueError: a budget that cannot be read, a model that cannot be run or converted.
        StatisticsError: the statistics lack what the search needs.
    """
    model = transformer_of(pipe)
    most = parse_budget(budget, model)
    stats.check_model(model)
    know_sites(model, stats)
    if most:
        return climb(model, stats, quiet=quiet, inputs=inputs, **choices).plan(most)
    return ends(model, inputs, choices).plan(most)


def ends(model: nn.Module, inputs: dict[str, Any] | None, choices: dict[str, Any]) -> Ladder:
    """The plans in 4 and in 8 bits."""
    low, high = (
        plan_of(model, Recipe.of(**{**BEST, **choices, "weights": weights}), (), inputs)
        for weights in ("w4p", "w8")
    )
    return Ladder(low, high)


@torch.no_grad()
def climb(
    pipe: Any,
    stats: CalibrationStats,
    *,
    quiet: bool = False,
    inputs: dict[str, Any] | None = None,
    **choices: Any,
) -> Ladder:
    """Measure what 8 bits gain, unit by unit; arguments and errors as `auto_plan`."""
    model = transformer_of(pipe)
    ladder, family = ends(model, inputs, choices), family_for(model, inputs)
    prefix, nbytes = _emulated(model, family, ladder.low, stats)
    better, _ = _emulated(model, family, ladder.high, stats)
    wanted, found = prefix.outputs(finished=False), units(model, ladder.low, ladder.high)
    base = noise(wanted, prefix.outputs(finished=True))
    gains: dict[str, float] = {}
    with progress_bar("trying 8 bits", len(found), quiet=quiet) as advance:
        for unit in found:
            _exchange(prefix, better, unit.linears)
            gains[unit.name] = 1 - noise(wanted, prefix.outputs(finished=True)) / base
            _exchange(prefix, better, unit.linears)
            advance()
    return replace(ladder, units=tuple(found), gains=gains, nbytes=nbytes)


def units(model: nn.Module, low: Plan, high: Plan) -> list[Unit]:
    """What can take 8 bits: the readers of each site, and each modulation, where they have 4 now."""
    eight = {entry.name: entry for entry in high.linears}
    members: dict[str, list[LinearPlan]] = {}
    cost: dict[str, int] = {}
    for entry in low.linears:
        better = eight[entry.name]
        if entry.site != OUTSIDE and entry.weights != better.weights:
            unit = entry.name if entry.site == MODULATION else entry.site
            bias = getattr(model.get_submodule(entry.name), "bias", None) is not None
            members.setdefault(unit, []).append(better)
            more = linear_bytes(better, bias) - linear_bytes(entry, bias)
            cost[unit] = cost.get(unit, 0) + more
    return [Unit(name, tuple(entries), cost[name]) for name, entries in members.items()]


def noise(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Mean over calls of |found - wanted|^2 / |wanted|^2."""
    shares = [
        float((b.double() - a.double()).square().sum() / a.double().square().sum())
        for a, b in zip(wanted, found, strict=True)
    ]
    return sum(shares) / len(shares)


def _emulated(
    model: nn.Module, family: Family, plan: Plan, stats: CalibrationStats
) -> tuple[Prefix, int]:
    """A copy that computes as the plan's checkpoint will, rounded without aiming; and the checkpoint's bytes."""
    linears = (
        replace(entry, rounding="gptq") if entry.rounding == "aimed" else entry
        for entry in plan.linears
    )
    plain = replace(plan, linears=tuple(linears))
    kept = list(stats.replay())
    prefix = Prefix(model, islice(kept, 0, None, max(1, len(kept) // CALLS)))

    packed = convert_in_memory(Job(model, model, family, plain, stats, True, prefix))
    return prefix, sum(tensor.numel() * tensor.element_size() for tensor in _tensors(packed))


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return iter({id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def _exchange(one: Prefix, other: Prefix, linears: tuple[str, ...]) -> None:
    """Swap linears between two copies; a second call swaps them back."""
    for name in linears:
        mine, theirs = one.seen.get_submodule(name), other.seen.get_submodule(name)
        one.finish(name, theirs)
        other.finish(name, mine)
