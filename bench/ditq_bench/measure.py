"""Candidates at one shape: checked first, then timed in turn, then held against the roof."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ditq_bench.ceilings import Ceilings
from ditq_bench.timing import Timing, time_in_turn


@dataclass(frozen=True)
class Candidate:
    """One way to compute something.

    Attributes:
        name: what runs.
        run: one call.
        check: relative error of what `run` returned, against fp64; at most `tolerance`.
        tolerance: derived where the candidate is made.
        kind: of its products: "int8", "bf16" or "fp32"; "" if it has none.
        num_bytes: that one call must move: operands read, results written.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], float]
    tolerance: float
    kind: str
    num_bytes: int


@dataclass(frozen=True)
class Row:
    """One candidate at one shape.

    Attributes:
        candidate: what ran.
        timing: seconds per call.
        tops: 1e12 operations per second at the median; of the whole shape, also for a part of the work.
        speedup: median of the fp32 baseline / own median, same run.
        speedup_bf16: the same over torch in bf16.
        num_bytes: that one call must move.
        roof: seconds at the measured ceilings / own median; None without ceilings.
        error: relative Frobenius error against fp64 on the operands it was given.
        computes: it does the products of the shape, not only the quantization.
    """

    candidate: str
    timing: Timing
    tops: float
    speedup: float
    speedup_bf16: float
    num_bytes: int
    roof: float | None
    error: float
    computes: bool


def measure(
    candidates: Sequence[Candidate],
    operations: int,
    device: torch.device,
    budget: float,
    ceilings: Ceilings | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Check, then time. The first candidate is the fp32 baseline, the second that in bf16; clock as in `time_in_turn`.

    Raises:
        RuntimeError: a result is wrong; no time is reported for a wrong answer.
    """
    errors = {candidate.name: _checked(candidate) for candidate in candidates}
    calls = {c.name: c.run for c in candidates}
    timings = time_in_turn(calls, device, budget=budget, clock=clock, graphs=True)
    first, second = (timings[c.name].median for c in candidates[:2])
    return [
        Row(
            candidate.name,
            timing := timings[candidate.name],
            operations / timing.median / 1e12,
            first / timing.median,
            second / timing.median,
            candidate.num_bytes,
            _roof(candidate, operations, timing, ceilings),
            errors[candidate.name],
            bool(candidate.kind),
        )
        for candidate in candidates
    ]


def relative_error(y: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((y.double() - truth).norm() / truth.norm())


def _roof(
    candidate: Candidate, operations: int, timing: Timing, ceilings: Ceilings | None
) -> float | None:
    if ceilings is None:
        return None
    return ceilings.floor(candidate.kind, operations, candidate.num_bytes) / timing.median


def _checked(candidate: Candidate) -> float:
    error = candidate.check(candidate.run())
    if not error <= candidate.tolerance:
        raise RuntimeError(
            f"bench: {candidate.name} is wrong (relative error {error:.1e}, at most {candidate.tolerance:.1e}); "
            "no time is reported"
        )
    return error
