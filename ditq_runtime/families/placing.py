"""The sites of a packed model by its family table: who reads each, and where its transform went."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ditq_runtime.errors import CheckpointError
from ditq_runtime.families.family import BlockTable, Family
from ditq_runtime.families.sites import AdaLN, NormWeights, OnTheFly, ProductRows, Site, ValueRows
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.site import SITES, SiteFormat

PLACES = {  # kind of producer -> where a fold into it stands
    OnTheFly: "quantizer",
    AdaLN: "adaln",
    ValueRows: "value",
    NormWeights: "norm",
    ProductRows: "product",
}
Shapes = Mapping[str, tuple[int, ...]]  # full name of a tensor -> its shape


def placed_sites(
    model: nn.Module,
    family: Family,
    formats: Mapping[str, LayerFormat],
    shapes: Shapes | None = None,
) -> dict[str, SiteFormat]:
    """The sites of a scheme, `BLOCK.SITE` -> format.

    Args:
        model: a float or packed transformer; its weights are not read.
        family: its table.
        formats: full name of a layer -> its format.
        shapes: of the tensors that are stored for the sites; none: nothing was transformed.

    Raises:
        CheckpointError: something was folded that nothing in the table can absorb.
    """
    found: dict[str, SiteFormat] = {}
    for block, table in family.block_tables(model).items():
        for site in table.sites:
            placed = _placed(model, block, table, site, formats, shapes or {})
            if placed is not None:
                found[f"{block}.{site.name}"] = placed
        for name in table.modulations:  # weight-only as a rule
            layer = formats.get(f"{block}.{name}")
            if layer is not None and layer.integer_gemm:
                reads = SiteFormat((f"{block}.{name}",), layer.activations)
                found[f"{block}.{modulation_site(name)}"] = reads
    return found


def modulation_site(name: str) -> str:
    """Inside the block, what a modulation linear of that name reads where its input is quantized."""
    return name.replace(".", "_")


def homes_of(model: nn.Module, family: Family) -> dict[str, str]:
    """Full name of a linear -> the `BLOCK.SITE` of its family table that it reads."""
    return {
        f"{block}.{name}": f"{block}.{site.name}"
        for block, table in family.block_tables(model).items()
        for site in table.sites
        for name in site.consumers
    }


def _placed(
    model: nn.Module,
    block: str,
    table: BlockTable,
    site: Site,
    formats: Mapping[str, LayerFormat],
    shapes: Shapes,
) -> SiteFormat | None:
    """None for a site that no stored layer reads, or that is float and untouched."""
    readers = tuple(f"{block}.{name}" for name in site.consumers if f"{block}.{name}" in formats)
    integer = (formats[name].activations for name in readers if formats[name].integer_gemm)
    activations, prefix = next(integer, "none"), f"{block}.{SITES}.{site.name}"
    smooths = f"{prefix}.smooth_inv" in shapes
    scaled, shifts = f"{prefix}.scale" in shapes, shapes.get(f"{prefix}.fold_shift", (0,))[0]
    if not readers or (activations == "none" and not scaled and not shifts):
        return None
    if not scaled and not shifts:
        shifts = shapes.get(f"{prefix}.shift", (0,))[0]
        return SiteFormat(readers, activations, smooth=smooths, shifts=shifts)
    place = PLACES[type(site.producer)]
    if place == "quantizer":
        raise CheckpointError(
            f"scheme: folds name a site {block}.{site.name}, which the family cannot fold"
        )
    producers = {f"{block}.{name}": rows for name, rows in _rows(model, block, table, site).items()}
    return SiteFormat(readers, activations, place, scaled, shifts, smooths, producers)


def _rows(
    model: nn.Module, block: str, table: BlockTable, site: Site
) -> dict[str, tuple[int, ...]]:
    """Producer inside the block -> where the rows begin that a fold of the site scales."""
    match site.producer:
        case AdaLN(modulation, shift_chunk, scale_chunk):
            reader: nn.Linear = model.get_submodule(f"{block}.{site.consumers[0]}")  # type: ignore[assignment]
            width = reader.in_features
            return {modulation: (shift_chunk * width, scale_chunk * width)}
        case ValueRows(values):
            return dict.fromkeys(values, (0,))
        case ProductRows(linear, start):
            return {linear: (start,)}
    return {}
