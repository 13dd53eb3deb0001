"""Which argument of a model carries the timestep: the one that sines and cosines embed for a linear to read."""

from __future__ import annotations

from ditq_converters.sites.usage import Usage

SINUSOIDS = frozenset({"sin", "cos"})
NAMES = ("time", "sigma")  # parts of a name; `t` alone too


def timestep_argument(usage: Usage) -> tuple[str | None, str]:
    """The argument that carries the timestep, and "" ; or None, and why there is none.

    Coordinates are turned into sines as well, but only attention reads those. What else is embedded so (guidance,
    sizes) is told from the timestep by name.
    """
    embedded = sorted(_embedded(usage))
    named = [name for name in embedded if name == "t" or any(part in name for part in NAMES)]
    found = named or embedded
    if len(found) == 1:
        return found[0], ""
    if not found:
        return None, "no argument of its forward is embedded as a timestep"
    return None, f"several arguments of its forward are timesteps: {', '.join(found)}"


def _embedded(usage: Usage) -> set[str]:
    """Arguments that only sines of theirs, and nothing else, reach some linear."""
    sines: dict[int, frozenset[str]] = {}  # value -> the arguments that it depends on
    for op in usage.graph.ops:
        out = op.outputs[0] if op.outputs else None
        if out is None or op.name == "linear":
            continue
        of = usage.depends[out]
        if op.name in SINUSOIDS or any(sines.get(value) == of for value in op.inputs):
            sines[out] = of
    calls = [op for calls in usage.graph.calls.values() for op in calls]
    return set().union(*(sines.get(op.get("input"), frozenset()) for op in calls))
