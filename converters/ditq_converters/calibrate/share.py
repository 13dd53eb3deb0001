"""The folder of a calibration: whose it is, who makes which shard, and the merge at the end.

Processes know of each other by the folder alone: locks on shards that are being made, and shards that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ditq_converters.calibrate.errors import StatisticsError
from ditq_converters.calibrate.merge import merge
from ditq_converters.calibrate.recorder import Recorder, Visit
from ditq_converters.calibrate.rows import RowChoice
from ditq_converters.calibrate.shards import ShardWriter, shard_folder
from ditq_converters.calibrate.stats import (
    MERGED,
    CalibrationStats,
    identity,
    read_manifest,
    write_manifest,
)
from ditq_converters.memory import give_back
from ditq_converters.progress import Log, progress_bar
from ditq_runtime.calls.sharing import once, take_turns, tidy
from ditq_runtime.families import Family
from ditq_runtime.files import atomic_folder, remove_locks

Models = dict[str, tuple[nn.Module, Family]]
LOCKS, LOG = "locks", "calibrate.log"
OURS = ("manifest.json", "inputs", LOCKS, LOG, MERGED)


def check_place(folder: Path) -> None:
    """StatisticsError unless the folder is new, empty, or holds statistics of this version."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StatisticsError(f"{folder}: is a file; give a new folder for the statistics")
    if (folder / "manifest.json").exists():
        if read_manifest(folder)["version"] == 1:
            raise StatisticsError(
                f"{folder}: holds statistics of version 1, which can be read but not gone on with; use a new folder"
            )
        return
    strange = [
        p.name
        for p in sorted(folder.iterdir())
        if p.name not in OURS and not p.name.startswith(".")
    ]
    if strange:
        raise StatisticsError(
            f"{folder}: holds something else ({', '.join(strange[:3])}); give a new folder for the statistics"
        )


def claim_folder(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a new run, or check that what is there is of the same; more inputs may follow."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "manifest.json").exists():
        write_manifest(folder, manifest)
        return read_manifest(folder)
    before = read_manifest(folder)
    known = before["settings"]
    shared = {k: known[k] for k in ("rows_per_input", "calls_per_input") if k in known}
    wanted = {**manifest, "settings": {**manifest["settings"], **shared}}
    for key, now in (*wanted["settings"].items(), *wanted.items()):
        then = before.get(key, known.get(key))
        grown = key == "inputs" and then == now[: len(then)]
        if key == "inputs" and then != now and not grown:
            raise StatisticsError(
                f"{folder}: holds a calibration with other inputs ({len(then)}, now {len(now)}; prompts or classes, "
                "steps, seed, guidance or size differ); use a new folder, or the same arguments to resume"
            )
        if key != "settings" and then != now and not grown:
            raise StatisticsError(
                f"{folder}: holds a calibration with other {key} ({_short(then)}, now {_short(now)}); "
                "use a new folder, or the same arguments to resume"
            )
    if before["inputs"] != wanted["inputs"]:
        write_manifest(folder, wanted)
    return read_manifest(folder)


def make_shards(
    folder: Path,
    manifest: dict[str, Any],
    models: Models,
    run: Callable[[int], Any],
    quiet: bool,
) -> None:
    """Make every shard that is not there: first this process' share, then what nobody works on."""
    total = len(manifest["inputs"])
    done = sum(shard_folder(folder, index).exists() for index in range(total))
    if done == total:
        return
    log = Log(folder / LOG, total, done)
    with progress_bar("calibrating", total, done, quiet) as advance:

        def make(index: int) -> None:
            calls = _make(folder, manifest, models, run, index, log)
            advance()
            log.finished(f"input {index} done, {calls} calls")

        take_turns(total, folder / LOCKS, lambda index: shard_folder(folder, index).exists(), make)


def _make(
    folder: Path,
    manifest: dict[str, Any],
    models: Models,
    run: Callable[[int], Any],
    index: int,
    log: Log,
) -> int:
    """One shard; how many calls it is of."""
    settings = manifest["settings"]
    with atomic_folder(shard_folder(folder, index)) as part:
        writer = ShardWriter(part)

        def done(visit: Visit) -> None:
            writer.add(visit)
            if log.is_due:
                calls = f"{recorder.calls} calls, now at timestep {visit.timestep:g}"
                log.write(f"input {index}: {calls}")

        choice = RowChoice(settings["rows_per_input"], settings["seed"], index)
        recorder = Recorder(
            models, choice, settings["calls_per_input"], settings["seed"], settings["attention"], done
        )  # fmt: skip
        with recorder:
            run(index)
            calls = recorder.finish()
        if not writer.visits:
            raise StatisticsError(f"input {index}: no transformer ran; is it an input?")
        writer.finish(identity(manifest, index), calls)
    give_back()
    return recorder.calls


def merge_shards(folder: Path, manifest: dict[str, Any], quiet: bool) -> None:
    """Merge all shards, unless that is done; one process does it, the others wait."""
    stats, inputs = CalibrationStats(folder, manifest), manifest["inputs"]

    def make() -> None:
        rows = manifest["settings"]["rows"]
        merge(folder, list(stats.shards()), inputs, stats.components, rows, quiet)

    once(folder / LOCKS / "merge", lambda: stats.merged_inputs == inputs, make)
    tidy(folder / LOCKS)
    remove_locks(shard_folder(folder, 0).parent)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
