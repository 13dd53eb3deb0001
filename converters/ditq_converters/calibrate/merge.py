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
from ditq_runtime.files import atomic_folder, write_json

Members = list[tuple[Shard, int]]  # the visits of one bin, in the order of the inputs
RANGES = (".min", ".max")
INPUT = ".input_rows"


def merge(
    folder: Path, shards: list[Shard], inputs: list[str], components: list[str], rows: int
) -> None:
    """Write `stats/merged` from all shards, whole or not at all.

    Args:
        folder: of the statistics.
        shards: in the order of the inputs.
        inputs: their digests.
        components: the transformers.
        rows: kept per site and call at most.
    """
    target = folder / MERGED
    shutil.rmtree(target, ignore_errors=True)
    with atomic_folder(target) as part:
        for component in components:
            (part / component).mkdir()
            _merge_component(part / component, shards, component, rows)
        write_json(part / MERGED_INPUTS, inputs)


def _merge_component(out: Path, shards: list[Shard], component: str, rows: int) -> None:
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
    for index in range(len(bins)):
        tensors = _ranges(_nearest(index, bins), handles)
        if index in calls:
            tensors |= _rows(bins[index], counts, handles)
        tensors |= _inputs(bins[index], rows, handles)
        save_file(dict(sorted(tensors.items())), shard_path(out, index), {"call": str(index)})
    write_json(out / SCHEDULE, {"timesteps": list(schedule.timesteps), "row_calls": list(calls)})


def _nearest(index: int, bins: list[Members]) -> dict[str, Members]:
    """SITE.min and .max -> visits of the bin, or of the nearest bin where the site ran (experts may get no tokens)."""
    found: dict[str, Members] = {}
    for other in sorted(range(len(bins)), key=lambda other: (abs(other - index), other)):
        new: dict[str, Members] = {}
        for shard, visit in bins[other]:
            for name in shard.visits[visit]:
                if name.endswith(RANGES) and name not in found:
                    new.setdefault(name, []).append((shard, visit))
        found |= new
    return found


def _ranges(places: dict[str, Members], handles: Handles) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, members in places.items():
        combine: Any = torch.minimum if name.endswith(".min") else torch.maximum
        for shard, visit in members:
            value = shard.read(visit, [name], handles)[name]
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
    found = {}
    for name, count in counts.items():
        rows = _joined(members, name, name.removesuffix(".rows") + ".keys", count, handles)
        if rows is not None:
            found[name] = rows
    return found


def _inputs(members: Members, rows: int, handles: Handles) -> dict[str, torch.Tensor]:
    names = {n for shard, visit in members for n in shard.visits[visit] if n.endswith(INPUT)}
    found = {}
    for name in names:
        site = name.removesuffix(INPUT)
        joined = _joined(members, name, f"{site}.input_keys", rows, handles)
        assert joined is not None
        found[f"{site}.input"] = joined
    return found


def _joined(
    members: Members, rows: str, keys: str, count: int, handles: Handles
) -> torch.Tensor | None:
    """The `count` rows of the lowest keys; of equal keys the earlier input's."""
    parts = [shard.read(visit, (rows, keys), handles) for shard, visit in members]
    kept = [Kept(part[keys], part[rows]) for part in parts if rows in part]
    if not kept:
        return None
    everything = Kept(
        torch.cat([part.keys for part in kept]), torch.cat([part.rows for part in kept])
    )
    order = everything.keys.sort(stable=True).indices[:count]
    return everything.rows[order].contiguous()
