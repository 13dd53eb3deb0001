"""What a model's linears can be stored as, what each choice costs and gains, and the best choices for a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ditq_converters.plan.entries import LinearPlan, SitePlan
from ditq_converters.plan.plan import Plan

STEPS = 1 << 14  # a budget is spent in so many parts of what the largest choices cost


@dataclass(frozen=True)
class Choice:
    """One way to store the linears of a unit.

    Attributes:
        entries: of the linears, in the plan.
        cost: bytes beyond the smallest choice.
        gain: share of the noise of the smallest model that it takes away.
        site: how their input is transformed; None for a modulation.
    """

    entries: tuple[LinearPlan, ...]
    cost: int = 0
    gain: float = 0.0
    site: SitePlan | None = None

    @property
    def name(self) -> str:
        """In words."""
        first = self.entries[0]
        return "8 bits" if first.weights == "w8" else f"4 bits in groups of {first.group_size}"

    @property
    def told(self) -> str:
        """What it gains and costs."""
        return f"{self.gain:.1%} of the noise for {self.cost:,} bytes"


@dataclass(frozen=True)
class Unit:
    """Linears that are stored alike: those of a site, or a modulation.

    Attributes:
        name: of the site, or of the modulation.
        choices: the smallest first.
    """

    name: str
    choices: tuple[Choice, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names."""
        return tuple(entry.name for entry in self.choices[0].entries)

    def entries(self, chosen: int) -> tuple[LinearPlan, ...]:
        """Those of a choice, with what it cost and what a better one would."""
        taken = self.choices[chosen]
        took = f", take away {taken.told}" if taken.cost else ""
        better = [
            f"{choice.name} would take away {choice.told}"
            for choice in self.choices
            if choice.gain > taken.gain
        ]
        reason = "; ".join([f"auto: {taken.name}{took}", *better])
        return tuple(replace(entry, reason=reason) for entry in taken.entries)


@dataclass(frozen=True)
class Ladder:
    """The plans of one model from the smallest to the largest.

    Attributes:
        low: every unit's smallest choice.
        high: all in 8 bits.
        units: what can be stored in several ways.
        nbytes: of the smallest checkpoint.
    """

    low: Plan
    high: Plan
    units: tuple[Unit, ...] = ()
    nbytes: int = 0

    def plan(self, most: int | None) -> Plan:
        """The plan for so many bytes; 0: the smallest; None: the largest.

        Raises:
            ValueError: the smallest checkpoint has more.
        """
        if not most:
            return self.high if most is None else self.low
        check_least(most, self.nbytes)
        chosen = best_choices(self.units, most - self.nbytes)
        entries = {entry.name: entry for entry in self.low.linears}
        sites = {site.name: site for site in self.low.sites}
        for unit, index in zip(self.units, chosen, strict=True):
            entries |= {entry.name: entry for entry in unit.entries(index)}
            site = unit.choices[index].site
            sites |= {} if site is None else {site.name: site}
        return replace(self.low, sites=tuple(sites.values()), linears=tuple(entries.values()))


def check_least(most: int, nbytes: int) -> None:
    """ValueError for a budget under the smallest checkpoint's bytes."""
    if most < nbytes:
        raise ValueError(
            f"--budget: {most:,} bytes are too few, the smallest checkpoint of this model has {nbytes:,}; "
            "take more, or smallest"
        )


def best_choices(units: tuple[Unit, ...], room: int) -> list[int]:
    """The choice of every unit that together gain most in so many bytes, noise of different units adding up.

    Solved exactly, by dynamic programming over the room in STEPS parts; costs are rounded up to whole parts. More room
    never gains less.

    Args:
        units: with their choices.
        room: bytes beyond all smallest choices.

    Returns:
        Index of the choice, unit by unit.
    """
    whole = sum(max(choice.cost for choice in unit.choices) for unit in units)
    part = max(1, -(-whole // STEPS))
    slots = min(room, whole) // part + 1
    best, taken = np.zeros(slots), []  # by parts spent
    for unit in units:
        tried = np.full((len(unit.choices), slots), -np.inf)
        for row, choice in zip(tried, unit.choices, strict=True):
            spent = -(-choice.cost // part)
            if spent < slots:
                row[spent:] = best[: slots - spent] + choice.gain
        taken.append(tried.argmax(0))
        best = tried.max(0)
    chosen, left = [], slots - 1
    for unit, of_slot in zip(reversed(units), reversed(taken), strict=True):
        index = int(of_slot[left])
        left -= -(-unit.choices[index].cost // part)
        chosen.append(index)
    return chosen[::-1]
