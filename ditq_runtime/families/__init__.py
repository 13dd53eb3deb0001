"""Model families: adapter tables, one file per diffusers transformer class, and one row for all others."""

from ditq_runtime.families.dit import DIT
from ditq_runtime.families.family import BlockTable, Family
from ditq_runtime.families.flux import FLUX
from ditq_runtime.families.generic import generic_family, is_transformer
from ditq_runtime.families.pixart import PIXART
from ditq_runtime.families.sd3 import SD3
from ditq_runtime.families.sites import (
    AdaLN,
    NormWeights,
    OnTheFly,
    Producer,
    ProductRows,
    Site,
    ValueRows,
    get_linear,
    rows_of,
)

FAMILIES: dict[str, Family] = {family.architecture: family for family in (DIT, PIXART, SD3, FLUX)}


def family_of(architecture: str) -> Family:
    """The adapter of a diffusers class name: its own table, or the generic row for any other transformer.

    Raises:
        ValueError: not one of diffusers' transformers; names those with a table.
    """
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    if is_transformer(architecture):
        return generic_family(architecture)
    raise ValueError(
        f"{architecture} has no family adapter; supported transformers: {', '.join(sorted(FAMILIES))}, "
        "and without folds every other transformer of diffusers"
    )


__all__ = [
    "FAMILIES",
    "AdaLN",
    "BlockTable",
    "Family",
    "NormWeights",
    "OnTheFly",
    "Producer",
    "ProductRows",
    "Site",
    "ValueRows",
    "family_of",
    "get_linear",
    "rows_of",
]
