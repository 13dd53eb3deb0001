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
    "stage", "seconds", "share", "cpu_seconds", "peak_rss_mib", "load_before", "load_after", "bytes_mib",
)  # fmt: skip
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


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    """full_size.json, full_size.csv and full_size_parts.csv in `folder`, and a table on stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    write_json(folder / "full_size.json", {"machine": machine, "note": NOTE, "stages": records})
    rows = table(records)
    _write_csv(folder / "full_size.csv", COLUMNS, rows)
    _write_csv(folder / "full_size_parts.csv", PARTS, parts(records))
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
    rows = []
    for record in records:
        size = record.get("transformer_bytes", record.get("bytes"))
        rows.append(
            (
                record["stage"],
                f"{record['seconds']:.1f}",
                f"{record['seconds'] / total:.3f}",
                f"{record['cpu_seconds']:.1f}",
                f"{record['peak_rss'] / MEBIBYTE:.0f}",
                f"{record['load_before']:.1f}",
                f"{record['load_after']:.1f}",
                "" if size is None else f"{size / MEBIBYTE:.1f}",
            )
        )
    return rows
