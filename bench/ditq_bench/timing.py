"""Time candidates side by side: in turn within every round, so that a drifting machine drifts for all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds of one run."""

    p20: float
    median: float
    p80: float
    rounds: int


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 15,
    budget: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every candidate once per round, after one warm-up call each.

    Args:
        candidates: name -> a function that runs one call.
        device: where they run; CUDA calls are timed with events.
        rounds: at most this many.
        budget: seconds for all candidates together; at least three rounds are run.
        clock: of calls on a CPU. `time.process_time` counts this process alone, where others share the machine: of all
            its threads together, so use one.

    Returns:
        name -> its timing.
    """
    for candidate in candidates.values():
        candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > budget:
            break
        for name, candidate in candidates.items():
            seconds[name].append(_time_once(candidate, device, clock))
    return {name: _summary(values) for name, values in seconds.items()}


def _time_once(
    candidate: Callable[[], object], device: torch.device, clock: Callable[[], float]
) -> float:
    if device.type != "cuda":
        begin = clock()
        candidate()
        return clock() - begin
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    candidate()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3


def _summary(values: list[float]) -> Timing:
    ordered = torch.tensor(values, dtype=torch.float64)
    p20, median, p80 = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return Timing(float(p20), float(median), float(p80), len(values))
