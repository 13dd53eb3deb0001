"""Names of the methods that there are, built-in ones and those of installed packages; nothing of a method is imported.

A package lists its methods under the entry-point group `ditq.methods`; docs/plan.md shows one.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

GROUP = "ditq.methods"
HOME = "ditq_converters.methods"
BUILT_IN = {
    name: EntryPoint(name, f"{HOME}.{name}:{name.upper()}", GROUP)
    for name in ("linear", "smoothquant", "osplus", "meta", "ditas", "ptq4dit", "htg")
}


def found_methods() -> dict[str, EntryPoint]:
    """Name -> where the method is, built-in ones first; a package cannot take the name of one of these."""
    return BUILT_IN | {p.name: p for p in entry_points(group=GROUP) if p.name not in BUILT_IN}
