"""Model families: adapter tables, one file per diffusers transformer class."""

from ditq_runtime.families.dit import DIT
from ditq_runtime.families.sites import AdaLN, Family, OnTheFly, Site, ValueRows, get_linear

FAMILIES: dict[str, Family] = {DIT.architecture: DIT}


def family_of(architecture: str) -> Family:
    """The adapter of a diffusers class name; ValueError names the supported ones."""
    if architecture not in FAMILIES:
        raise ValueError(
            f"{architecture} has no family adapter; supported transformers: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[architecture]


__all__ = [
    "FAMILIES",
    "AdaLN",
    "Family",
    "OnTheFly",
    "Site",
    "ValueRows",
    "family_of",
    "get_linear",
]
