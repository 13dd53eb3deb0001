"""The records of `full_size` as JSON, CSV and a table."""

from __future__ import annotations

import csv
import json
import platform
from pathlib import Path
from typing import Any

import torch

from ditq_bench.results import commit, device_name
from ditq_runtime.cli.output import print_table
from ditq_runtime.files import atomic_file, write_json

MEBIBYTE = 2**20
COLUMNS = (
    "stage", "blocks", "samples", "model_calls", "seconds", "share", "cpu_seconds", "peak_rss_mib",
    "memory_budget_mib", "load_before", "load_after", "bytes_mib", "earlier_parts", "commit",
)  # fmt: skip
COPIED = ("blocks", "samples", "model_calls", "earlier_parts", "commit")  # as the record has them
NAME = "full_size"
PARTS = ("stage", "part", "cpu_seconds")
LEAST = 0.1  # seconds of a part that is shown
NOTE = (
    "Random weights of DiT-XL/2's shape; other work ran on the machine at the same time (see the loads), so seconds "
    "are upper bounds and only shares and ratios compare."
)


def read(path: Path) -> dict[str, Any]:
    """One stage's record."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def write(folder: Path, records: list[dict[str, Any]], name: str = NAME) -> None:
    """NAME.json, NAME.csv and NAME_parts.csv in `folder`, and a table on stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    write_json(folder / f"{name}.json", {"machine": machine, "note": NOTE, "stages": records})
    rows = table(records)
    _write_csv(folder / f"{name}.csv", COLUMNS, rows)
    _write_csv(folder / f"{name}_parts.csv", PARTS, parts(records))
    print_table("a DiT-XL/2-sized model", COLUMNS, rows)


def parts(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """One row of PARTS for everything that conversions spent a tenth of a second on."""
    return [
        (record["stage"], part, f"{seconds:.1f}")
        for record in records
        for part, seconds in record.get("cpu_seconds_by_part", {}).items()
        if seconds >= LEAST
    ]


def _write_csv(path: Path, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    with atomic_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def table(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """One row of COLUMNS a stage."""
    total = sum(record["seconds"] for record in records) or 1.0
    return [tuple(_row(record, total)[name] for name in COLUMNS) for record in records]


def _row(record: dict[str, Any], total: float) -> dict[str, Any]:
    size, budget = record.get("transformer_bytes", record.get("bytes")), record.get("memory_budget")
    return {
        **{name: record.get(name, "") for name in COPIED},
        "stage": record["stage"],
        "seconds": f"{record['seconds']:.1f}",
        "share": f"{record['seconds'] / total:.3f}",
        "cpu_seconds": f"{record['cpu_seconds']:.1f}",
        "peak_rss_mib": f"{record['peak_rss'] / MEBIBYTE:.0f}",
        "memory_budget_mib": "" if budget is None else f"{budget / MEBIBYTE:.0f}",
        "load_before": f"{record['load_before']:.1f}",
        "load_after": f"{record['load_after']:.1f}",
        "bytes_mib": "" if size is None else f"{size / MEBIBYTE:.1f}",
    }
