"""All shards of one transformer -> one file per timestep, the form that everything reads.

    stats/merged/COMPONENT/schedule.json            timesteps, noisiest first
    stats/merged/COMPONENT/call_0000.safetensors    per site SITE.min and SITE.max, fp32 [K], SITE.rows [n, K], and per
                                                    modulation linear MODULATION.input [r, K]; call 0 is the noisiest

Maxima merge in any order; all else comes in the order of the inputs, so that the bytes do not depend on who made which
shard, nor when.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ditq_converters.calibrate.rows import Kept, evenly_spaced
from ditq_converters.calibrate.schedule import schedule_of
from ditq_converters.calibrate.shards import Handles, Shard
from ditq_converters.calibrate.stats import MERGED, MERGED_INPUTS, SCHEDULE, shard_path
from ditq_converters.progress import progress_bar
from ditq_runtime.files import atomic_folder, write_json

Members = list[tuple[Shard, int]]  # the visits of one bin, in the order of the inputs
RANGES = (".min", ".max")
INPUT = ".input_rows"


def merge(
    folder: Path,
    shards: list[Shard],
    inputs: list[str],
    components: list[str],
    rows: int,
    quiet: bool = True,
) -> None:
    """Write `stats/merged` from all shards, whole or not at all.

    Args:
        folder: of the statistics.
        shards: in the order of the inputs.
        inputs: their digests.
        components: the transformers.
        rows: kept per site and call at most.
        quiet: show no bar of the timesteps that are merged.
    """
    target = folder / MERGED
    shutil.rmtree(target, ignore_errors=True)
    with atomic_folder(target) as part:
        for component in components:
            (part / component).mkdir()
            _merge_component(part / component, shards, component, rows, quiet)
        write_json(part / MERGED_INPUTS, inputs)


def _merge_component(
    out: Path, shards: list[Shard], component: str, rows: int, quiet: bool
) -> None:
    runs = [
        [(i, v["timestep"]) for i, v in enumerate(s.meta["visits"]) if v["component"] == component]
        for s in shards
    ]
    if not any(runs):
        write_json(out / SCHEDULE, {"timesteps": [], "row_calls": []})
        return
    schedule = schedule_of([[timestep for _, timestep in run] for run in runs])
    bins: list[Members] = [[] for _ in schedule.timesteps]
    for shard, run in zip(shards, runs, strict=True):
        for visit, timestep in run:
            bins[schedule.bin_of[timestep]].append((shard, visit))
    calls = evenly_spaced(len(bins)) if rows else ()
    counts, handles = _row_counts([bins[call] for call in calls], rows), Handles()
    with progress_bar(f"merging {component}", len(bins), 0, quiet) as advance:
        for index in range(len(bins)):
            tensors = _ranges(_nearest(index, bins), handles)
            if index in calls:
                tensors |= _rows(bins[index], counts, handles)
            tensors |= _inputs(bins[index], rows, handles)
            save_file(dict(sorted(tensors.items())), shard_path(out, index), {"call": str(index)})
            advance()
    write_json(out / SCHEDULE, {"timesteps": list(schedule.timesteps), "row_calls": list(calls)})


def _nearest(index: int, bins: list[Members]) -> list[tuple[Shard, int, list[str]]]:
    """Visits and their SITE.min and .max: of the bin, or of the nearest where it ran (experts may get no tokens)."""
    places: list[tuple[Shard, int, list[str]]] = []
    found: set[str] = set()
    for other in sorted(range(len(bins)), key=lambda other: (abs(other - index), other)):
        new = set[str]()
        for shard, visit in bins[other]:
            names = [n for n in shard.visits[visit] if n.endswith(RANGES) and n not in found]
            if names:
                places.append((shard, visit, names))
                new.update(names)
        found |= new
    return places


def _ranges(
    places: list[tuple[Shard, int, list[str]]], handles: Handles
) -> dict[str, torch.Tensor]:
    """The union of the ranges, visit by visit: to go from site to site would open all files again for each."""
    found: dict[str, torch.Tensor] = {}
    for shard, visit, names in places:
        for name, value in shard.read(visit, names, handles).items():
            combine: Any = torch.minimum if name.endswith(".min") else torch.maximum
            found[name] = combine(found[name], value) if name in found else value
    return found


def _row_counts(bins: list[Members], rows: int) -> dict[str, int]:
    """SITE -> rows that every bin has, so that they stack."""
    counts: dict[str, int] = {}
    for members in bins:
        there: dict[str, int] = {}
        for shard, visit in members:
            for name, (_, length) in shard.visits[visit].items():
                if name.endswith(".rows"):
                    there[name] = there.get(name, 0) + length
        for name, count in there.items():
            counts[name] = min(count, counts.get(name, rows))
    return counts


def _rows(members: Members, counts: dict[str, int], handles: Handles) -> dict[str, torch.Tensor]:
    return _lowest(members, counts, ".rows", ".keys", handles)


def _inputs(members: Members, rows: int, handles: Handles) -> dict[str, torch.Tensor]:
    names = {n for shard, visit in members for n in shard.visits[visit] if n.endswith(INPUT)}
    found = _lowest(members, dict.fromkeys(names, rows), INPUT, ".input_keys", handles)
    return {f"{name.removesuffix(INPUT)}.input": rows for name, rows in found.items()}


def _lowest(
    members: Members, counts: dict[str, int], rows: str, keys: str, handles: Handles
) -> dict[str, torch.Tensor]:
    """Of every name the `count` rows of the lowest keys; of equal keys the earlier input's. Visit by visit, as ranges.

    Args:
        members: of one bin.
        counts: SITE + rows -> how many.
        rows: the suffix of rows.
        keys: the suffix of their keys.
        handles: of the files.
    """
    found: dict[str, Kept] = {}
    for shard, visit in members:
        for name, count in counts.items():
            part = shard.read(visit, (name, name.removesuffix(rows) + keys), handles)
            if name in part:
                new = Kept(part[name.removesuffix(rows) + keys], part[name])
                before = found.get(name, Kept(new.keys[:0], new.rows[:0]))
                found[name] = before.joined(new, count)
    return {name: kept.rows.contiguous() for name, kept in found.items()}
