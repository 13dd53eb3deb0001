"""A discovered family as JSON, so that statistics can carry it: whoever has them needs no forward to find it again."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from torch import nn

from ditq_runtime.families import (
    BlockTable,
    Family,
    NormWeights,
    OnTheFly,
    Producer,
    ProductRows,
    Site,
    ValueRows,
)

PRODUCERS: dict[str, type] = {
    kind.__name__: kind for kind in (NormWeights, ValueRows, ProductRows, OnTheFly)
}


def to_record(family: Family, model: nn.Module) -> dict[str, Any]:
    """What JSON can hold of a discovered family; equal tables stand once.

    Args:
        family: of `find_sites`.
        model: that it was found on.
    """
    tables: list[dict[str, Any]] = []
    blocks = {}
    for block, table in family.block_tables(model).items():
        stored = {
            "sites": [_site_record(site) for site in table.sites],
            "modulations": table.modulations,
        }
        if stored not in tables:
            tables.append(stored)
        blocks[block] = tables.index(stored)
    return {
        "architecture": family.architecture,
        "timestep_argument": family.timestep_argument,
        "why_no_timestep": family.why_no_timestep,
        "tables": tables,
        "blocks": blocks,
        "kept": family.kept,
    }


def from_record(record: dict[str, Any]) -> Family:
    """The family of a record."""
    tables = [
        BlockTable(tuple(_site(site) for site in stored["sites"]), dict(stored["modulations"]))
        for stored in record["tables"]
    ]
    of_model = {block: tables[index] for block, index in record["blocks"].items()}
    return Family(
        record["architecture"],
        lambda model: of_model,
        dict(record["kept"]),
        timestep_argument=record["timestep_argument"],
        why_no_timestep=record["why_no_timestep"],
    )


def _site_record(site: Site) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(json.dumps(asdict(site)))
    return {**stored, "producer": type(site.producer).__name__, "fields": stored["producer"]}


def _site(stored: dict[str, Any]) -> Site:
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["fields"].items()}
    producer: Producer = PRODUCERS[stored["producer"]](**fields)
    readers, streams = tuple(stored["consumers"]), tuple(stored["streams"])
    return Site(stored["name"], readers, producer, streams, stored["timed"])
