"""Change entries of a plan by a pattern of their names: `transformer_blocks.*.ff.net.2:weights=w8`."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import ditq_kernels as k
from ditq_converters.methods import METHODS
from ditq_converters.plan.entries import (
    MODULATION,
    QUANTIZED,
    SHIFTS_AT,
    AttentionPlan,
    Entry,
    LinearPlan,
    SitePlan,
)
from ditq_runtime.format.layer import GROUPED

if TYPE_CHECKING:
    from ditq_converters.plan.plan import Plan

GROUP_SIZE = 64  # inputs per group where a linear becomes w4p or w4g and nobody says
BY_HAND = "by hand: "
OF_WEIGHTS = (
    "weights",
    "group_size",
    "symmetric",
    "weight_ranges",
)  # fields that weight-only linears have too
E = TypeVar("E", bound=Entry)
Values = dict[str, Any]


def parse_rule(rule: str) -> tuple[str, Values]:
    """`PATTERN:field=value,field=value` -> the pattern and its values; numbers, true, false and null as in JSON.

    Raises:
        ValueError: not of that form.
    """
    pattern, colon, rest = rule.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")]
    if not pattern or not colon or not all(name and sign for name, sign, _ in pairs):
        raise ValueError(
            f"--set must read PATTERN:field=value, as 'transformer_blocks.*.ff.net.2:weights=w8', got {rule!r}"
        )
    return pattern, {name.strip(): _parsed(value.strip()) for name, _, value in pairs}


def changed(entries: Plan, pattern: str, values: Values) -> tuple[Any, Any, Any]:
    """A plan's sites, linears and attention with new values where the pattern matches; errors as `Plan.set`."""
    sites = {s.name for s in entries.sites if _matches(s, pattern)}
    linears = {e.name for e in entries.linears if _matches(e, pattern)}
    attention = {a.name for a in entries.attention if _matches(a, pattern)}
    if not sites | linears | attention:
        raise ValueError(f"plan: {pattern!r} matches no site, linear or attention of the plan")
    own_sites = sites | {e.site for e in entries.linears if e.name in linears}
    own_linears = linears | {r for s in entries.sites if s.name in sites for r in s.readers}
    reached: set[str] = set()

    def apply(listed: tuple[E, ...], named: set[str], takes: Any, change: Any) -> tuple[E, ...]:
        after = []
        for entry in listed:
            own = takes(entry, values) if entry.name in named else {}
            reached.update(own)
            after.append(change(entry, own) if own else entry)
        return tuple(after)

    integer = {e.site: e.activations for e in entries.linears if e.is_integer}
    new_entries = (
        apply(entries.sites, own_sites, _of_site, _site),
        apply(entries.linears, own_linears, _of_linear, partial(_linear, integer=integer)),
        apply(entries.attention, attention, _of_attention, _attention),
    )
    lost = [name for name in values if name not in reached]
    if lost:
        raise ValueError(
            f"plan: nothing that {pattern!r} matches can be given {', '.join(lost)}; linears have "
            f"{', '.join(_names(LinearPlan))}, sites {', '.join(_names(SitePlan))} and the options of their methods, "
            f"attention {', '.join(_names(AttentionPlan))}"
        )
    return new_entries


def _of_site(site: SitePlan, values: Values) -> Values:
    method = METHODS.get(values.get("method", site.method))
    names = _names(SitePlan) + (() if method is None else method.option_names)
    return {name: value for name, value in values.items() if name in names}


def _site(site: SitePlan, own: Values) -> SitePlan:
    fields_of = {name: value for name, value in own.items() if name in _names(SitePlan)}
    kept = site.options if own.get("method", site.method) == site.method else {}
    told = {name: value for name, value in own.items() if name not in fields_of}
    shifts = SHIFTS_AT.get(own.get("place", ""), site.shifts)
    reason = _reason(site.reason, own)
    return replace(site, **fields_of, options={**kept, **told}, shifts=shifts, reason=reason)


def _of_linear(linear: LinearPlan, values: Values) -> Values:
    if linear.weights == "as it is":
        return {}
    own = {name: value for name, value in values.items() if name in _names(LinearPlan)}
    if linear.site == MODULATION or (linear.weights not in QUANTIZED and "weights" not in own):
        return {name: value for name, value in own.items() if name in OF_WEIGHTS}
    return own


def _linear(linear: LinearPlan, own: Values, integer: dict[str, str]) -> LinearPlan:
    reason, own = _reason(linear.reason, own), dict(own)
    weights = own.get("weights", linear.weights)
    if weights not in QUANTIZED:
        fresh = LinearPlan(linear.name, linear.shape, linear.site, weights)
        return replace(fresh, **own, reason=reason)
    if weights in GROUPED:
        asked = own.get("group_size") or linear.group_size or GROUP_SIZE
        own["group_size"] = _fitting(linear, weights, asked)
    else:
        own.setdefault("group_size", None)
    own.setdefault("symmetric", linear.symmetric and weights == "w4g")
    if linear.weights not in QUANTIZED and linear.site != MODULATION:
        own.setdefault("activations", integer.get(linear.site, "token"))
    return replace(linear, **own, reason=reason)


def _fitting(linear: LinearPlan, weights: str, asked: Any) -> int:
    try:
        return k.resolve_group_size(linear.shape[1], asked, one_group=weights == "w4g")
    except (ValueError, TypeError) as error:
        raise ValueError(f"plan: {linear.name}: {error}") from error


def _of_attention(entry: AttentionPlan, values: Values) -> Values:
    return {name: value for name, value in values.items() if name in _names(AttentionPlan)}


def _attention(entry: AttentionPlan, own: Values) -> AttentionPlan:
    return replace(entry, **own, reason=_reason(entry.reason, own))


def _names(kind: type) -> tuple[str, ...]:
    """Fields that a person may set: not the facts of a model, nor the words."""
    fixed = ("name", "readers", "shape", "site", "shifts", "options", "reason")
    return tuple(field.name for field in fields(kind) if field.name not in fixed)


def _reason(old: str, values: Values) -> str:
    made = ", ".join(f"{name}={value}" for name, value in values.items())
    return f"{old}, {made}" if old.startswith(BY_HAND) else f"{BY_HAND}{made}"


def _matches(entry: Entry, pattern: str) -> bool:
    return fnmatchcase(entry.name, pattern)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
