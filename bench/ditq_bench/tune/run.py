"""Time launches on this GPU and write the best ones as its table."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ditq_bench.results import commit
from ditq_bench.timing import time_in_turn
from ditq_bench.tune.problems import PROBLEMS
from ditq_bench.tune.space import Bucket
from ditq_kernels.launch.tuning import UNSAID
from ditq_runtime.files import atomic_file


@dataclasses.dataclass(frozen=True)
class Timed:
    """One launch of a bucket: median seconds of a call, p20 and p80."""

    config: Any
    p20: float
    median: float
    p80: float


def same(one: Any, other: Any) -> bool:
    """Exactly, but for sums of bf16 products, whose order depends on the tile."""
    if isinstance(one, tuple):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    if torch.equal(one, other):
        return True
    if not one.is_floating_point():
        return False
    difference = (one.double() - other.double()).norm() / other.double().norm()
    return bool(difference < 2**-8)


def time_launches(
    bucket: Bucket,
    configs: list[Any],
    device: torch.device,
    budget: float,
    refused: Callable[[str], None] | None = None,
    differs: Callable[[str], None] | None = None,
    equal: Callable[[Any, Any], bool] = same,
) -> list[Timed]:
    """Check every launch against the default one, exactly, then time them in turn; the fastest first.

    Args:
        bucket: the problem.
        configs: launches to time.
        device: where.
        budget: seconds of timing.
        refused: told of each launch that the compiler or the GPU refuses, which is then left out; without it, the
            error is raised.
        differs: told of each launch with another result than the default's, which is then left out.
        equal: whether two results are the same.

    Raises:
        RuntimeError: a launch gives another result than the default, and nobody is told; one of them is wrong.
    """
    run = PROBLEMS[bucket.op](bucket, device)
    expected = run(bucket.default)
    running = []
    for config in configs:
        try:
            got = run(config)
        except Exception as error:  # the compiler has errors of many classes
            if refused is None:
                raise
            refused(f"{bucket.op} with {config}: {' '.join(str(error).split())[:200]}")
            continue
        if equal(got, expected):
            running.append(config)
            continue
        sentence = f"tune: {bucket.op} with {config} differs from {bucket.default}"
        if differs is None:
            raise RuntimeError(sentence)
        differs(sentence)
    configs = running
    candidates: dict[str, Callable[[], object]] = {
        str(index): functools.partial(run, config) for index, config in enumerate(configs)
    }
    timings = time_in_turn(candidates, device, rounds=30, budget=budget, graphs=True)
    timed = [
        Timed(config, t.p20, t.median, t.p80)
        for config, t in zip(configs, timings.values(), strict=True)
    ]
    return sorted(timed, key=lambda item: item.median)


def tune(
    plan: list[tuple[Bucket, list[Any]]],
    device: torch.device,
    budget: float,
    refused: Callable[[str], None] | None = None,
) -> Iterator[tuple[Bucket, list[Timed]]]:
    """Time bucket after bucket within a budget of seconds; what it does not reach keeps its default.

    With `refused`, as in `time_launches`, a bucket with a wrong result is told of and left out.
    """
    end = time.perf_counter() + budget
    for index, (bucket, configs) in enumerate(plan):
        left = end - time.perf_counter()
        if left <= 0:
            return
        try:
            timed = time_launches(bucket, configs, device, left / (len(plan) - index), refused)
        except RuntimeError as error:
            if refused is None:
                raise
            refused(str(error))
            continue
        yield bucket, timed


def table_of(
    found: list[tuple[Bucket, list[Timed]]], architecture: str, device: str
) -> dict[str, Any]:
    """A launch table as in `tuned/`: per op, rows with their limits."""
    ops: dict[str, list[dict[str, Any]]] = {}
    for bucket, timed in found:
        fields = dataclasses.asdict(timed[0].config).items()
        said = {name: value for name, value in fields if value not in _unsaid(name)}
        row = bucket.limits | said
        ops.setdefault(bucket.op, []).append(row)
    return {
        "architecture": architecture, "device": device, "triton": version("triton"),
        "provenance": f"timed as CUDA graphs by ditq tune, commit {commit()}", "ops": ops,
    }  # fmt: skip


def _unsaid(name: str) -> tuple[Any, ...]:
    """Defaults of a field; "auto" is not one."""
    return tuple(value for value in UNSAID.get(name, ()) if value != "auto")


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write a launch table atomically."""
    with atomic_file(path) as part:
        part.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
