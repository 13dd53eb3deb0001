"""Statistics carry the sites that they are of, so that whoever has them makes no inputs and traces nothing again."""

from __future__ import annotations

from typing import Any

from torch import nn

from ditq_converters.calibrate.stats import CalibrationStats, StatisticsError
from ditq_converters.sites.find import remember
from ditq_converters.sites.record import from_record, to_record
from ditq_runtime.families import FAMILIES, Family

FAMILY = "family"  # of one model, in the manifest


def sites_record(model: nn.Module, family: Family) -> dict[str, Any]:
    """What the manifest says of a model's sites; nothing where the class has a table."""
    told = family.architecture in FAMILIES
    return {} if told else {FAMILY: to_record(family, model)}


def know_sites(model: nn.Module, stats: CalibrationStats | None) -> None:
    """Make the sites that were watched those of a model; nothing where there are none, as for a class with a table.

    Raises:
        StatisticsError: they are of a model with other linears.
    """
    models = {} if stats is None else stats.manifest.get("models", {})
    record = models.get(getattr(stats, "component", ""), {}).get(FAMILY)
    if record is None:
        return
    family = from_record(record)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    read = {
        f"{block}.{name}"
        for block, table in family.block_tables(model).items()
        for name in table.linears
    }
    if family.architecture != type(model).__name__ or not read <= linears:
        assert stats is not None
        raise StatisticsError(
            f"{stats.folder}: these statistics are of another {family.architecture}, this {type(model).__name__} has "
            "other linears; calibrate this model into a new folder"
        )
    remember(model, family)
