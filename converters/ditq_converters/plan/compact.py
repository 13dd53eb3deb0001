"""A plan in a few lines: what all blocks have in common once, with `*` for their numbers. No reasons."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ditq_converters.plan.entries import QUANTIZED, Entry
from ditq_converters.plan.file import to_dict
from ditq_converters.plan.plan import Plan

FACTS = ("readers", "shape", "site", "shifts", "reason")  # the model has them, or they are words


def compact(plan: Plan) -> dict[str, Any]:
    """JSON-safe: kinds of entries -> name -> choices. Names with a number stand for all blocks that agree."""
    return {
        "kept_dtype": plan.kept_dtype,
        "sites": _merged(plan.sites),
        "linears": _merged(e for e in plan.linears if e.weights != "as it is"),
        "attention": _merged(entry for entry in plan.attention if entry.values != "none"),
    }


def headline(plan: Plan) -> dict[str, str]:
    """Methods, weights and activations of a plan, each as one word or a few."""
    inner = [entry for entry in plan.linears if entry.activations != "none"]
    methods = dict.fromkeys(site.method for site in plan.sites)
    if len(methods) > 1:
        methods.pop("linear", None)
    return {
        "method": ", ".join(methods),
        "weights": ", ".join(dict.fromkeys(e.weights for e in inner if e.weights in QUANTIZED)),
        "activations": ", ".join(dict.fromkeys(entry.activations for entry in inner)),
    }


def _merged(entries: Iterable[Entry]) -> dict[str, Any]:
    """Name or pattern -> choices."""
    choices = {
        entry.name: {key: value for key, value in to_dict(entry).items() if key not in FACTS}
        for entry in entries
    }
    alike: dict[str, list[str]] = {}
    for name in choices:
        alike.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(name)
    found: dict[str, Any] = {}
    for pattern, names in alike.items():
        if all(choices[name] == choices[names[0]] for name in names):
            found[pattern if len(names) > 1 else names[0]] = choices[names[0]]
        else:
            found.update({name: choices[name] for name in names})
    return found
