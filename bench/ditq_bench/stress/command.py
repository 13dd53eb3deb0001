"""The command line of the attacks, and the table of their outcomes.

    python -m ditq_bench.stress --short                      a minute or two
    python -m ditq_bench.stress --csv stress.csv             the long run: tens of minutes on one core
    python -m ditq_bench.stress reader --cases 100000        one kind

Every kind prints its seed: the same seed and number make the same case again.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ditq_bench.results import commit, device_name
from ditq_bench.stress import kills, loading, reader, surroundings, threads, writers
from ditq_bench.stress.outcome import Tally
from ditq_bench.stress.target import targets
from ditq_runtime.cli.output import print_table, say

FIELDS = (
    "device", "torch", "commit", "kind", "seed", "cases", "right", "named", "findings", "cpu_seconds",
)  # fmt: skip


def _reader(folder: Path, cases: int, seed: int) -> list[Tally]:
    return reader.attack(*targets(folder), cases, seed)


def _loading(folder: Path, cases: int, seed: int) -> list[Tally]:
    return loading.attack(*targets(folder), cases, seed)


def _surroundings(folder: Path, cases: int, seed: int) -> list[Tally]:
    return surroundings.attack(cases, seed)


def _models(folder: Path, cases: int, seed: int) -> list[Tally]:
    return surroundings.attack_models(folder)


def _threads(folder: Path, cases: int, seed: int) -> list[Tally]:
    """Seeds play no part: the system decides which thread runs."""
    tallies = {kind: Tally(f"threads: {kind}", seed) for kind in threads.KINDS}
    for name, model in threads.models(folder):
        say(f"  {name}")
        for kind, tally in tallies.items():
            outcome = threads.stress_model(name, model, kind, cases)
            tally.cases += outcome.forwards
            tally.right += outcome.forwards - outcome.wrong
            if outcome.wrong:
                tally.findings.append(f"threads: {name} {kind}: {outcome.wrong} forwards differ")
    return list(tallies.values())


def _kills(folder: Path, cases: int, seed: int) -> list[Tally]:
    tallies = []
    for outcome in kills.stress(cases, folder / "kills", seed):
        tally = Tally(f"kills: {outcome.job}", seed, outcome.kills, outcome.identical)
        if outcome.identical < outcome.kills or outcome.leftovers:
            tally.findings.append(f"kills: {outcome}")
        tallies.append(tally)
    return tallies


KINDS: dict[str, tuple[Callable[[Path, int, int], list[Tally]], int, int]] = {  # cases: long, short
    "reader": (_reader, 100_000, 1000),
    "from_pretrained": (_loading, 1000, 40),
    "surroundings": (_surroundings, 3000, 150),
    "models": (_models, 1, 1),
    "writers": (writers.attack, 24, 1),
    "kills": (_kills, 60, 2),
    "threads": (_threads, 1000, 39),  # forwards of each combination
}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0 if nothing was found."""
    parser = argparse.ArgumentParser(
        description="Attack ditq; every outcome must be right or named."
    )
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; default: all"
    )
    parser.add_argument("--short", action="store_true", help="few cases of each")
    parser.add_argument("--cases", type=int, help="of each kind, in place of its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="append a row for each kind")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.kinds) - KINDS.keys())
    if unknown or (options.cases is not None and options.cases < 1):
        parser.error(f"unknown kind {unknown[0]!r}" if unknown else "--cases must be at least 1")
    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    rows = []
    for name in options.kinds or KINDS:
        _, many, few = KINDS[name]
        came = _run(name, options.cases or (few if options.short else many), options.seed)
        if options.csv is not None:
            _append(options.csv, came)  # at once: a run that is stopped keeps what it has
        rows += came
    columns = FIELDS[3:]
    print_table("stress", columns, [[row[key] for key in columns] for row in rows])
    return 1 if any(row["findings"] for row in rows) else 0


def _run(name: str, cases: int, seed: int) -> list[dict[str, Any]]:
    attack = KINDS[name][0]
    say(f"{name}: {cases} cases, seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        tallies = attack(Path(folder), cases, seed)
        seconds = round((time.process_time() - begin) / len(tallies), 1)
    for tally in tallies:
        for finding in tally.findings[:50]:
            say(f"  {finding}")
    return [
        {
            "kind": tally.kind, "seed": seed, "cases": tally.cases, "right": tally.right, "named": tally.named,
            "findings": len(tally.findings), "cpu_seconds": seconds,
        }
        for tally in tallies
    ]  # fmt: skip


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table that names its commit; what is there stays."""
    origin = {
        "device": device_name(torch.device("cpu")),
        "torch": version("torch"),
        "commit": commit(),
    }
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows([{**origin, **row} for row in rows])
