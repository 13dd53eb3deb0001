"""Time candidates side by side: in turn within every round, so that a drifting machine drifts for all alike.

On a GPU a call is timed with CUDA events. A launch from Python takes longer than many a kernel runs, so kernels are
timed as replays of a CUDA graph that holds several calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

CALLS = 10  # in a graph; the events around a replay then weigh little
ROUND = 1e-3  # seconds that a round lasts at least: the clock, and what else wakes up, then weigh little
MOST = 1000  # calls in a round
LONG = 0.5  # seconds of a warm-up after which nobody asks how many calls make a round


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds of one run.

    Attributes:
        p20: a fifth of the rounds was faster.
        median: half of them.
        p80: four fifths.
        rounds: how many.
        how: "clock", "events", or "graph": events around a replay of CALLS calls.
    """

    p20: float
    median: float
    p80: float
    rounds: int
    how: str = "clock"

    @property
    def spread(self) -> float:
        """(p80 - p20) / median: what the rounds differ by."""
        return (self.p80 - self.p20) / self.median


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 15,
    budget: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
    graphs: bool = False,
) -> dict[str, Timing]:
    """Time every candidate once per round, after one warm-up call each; a short one is called until ROUND is over.

    Args:
        candidates: name -> a function that runs one call.
        device: where they run; CUDA calls are timed with events.
        rounds: at most this many.
        budget: seconds for all candidates together; at least three rounds are run.
        clock: of calls on a CPU. `time.process_time` counts this process alone, where others share the machine: of all
            its threads together, so use one.
        graphs: on CUDA, time replays of a graph; a candidate that cannot be captured is timed call by call.

    Returns:
        name -> its timing.
    """
    calls = {}
    for name, candidate in candidates.items():
        begin = time.perf_counter()
        candidate()
        short = time.perf_counter() - begin < LONG
        calls[name] = _call(candidate, device, graphs, clock if short else None)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > budget:
            break
        for name, call in calls.items():
            seconds[name].append(_time_once(call.run, device, clock) / call.count)
    return {name: _summary(values, calls[name].how) for name, values in seconds.items()}


@dataclass(frozen=True)
class _Call:
    """What is timed: `count` calls of a candidate at once."""

    run: Callable[[], object]
    count: int
    how: str


def _call(
    candidate: Callable[[], object],
    device: torch.device,
    graphs: bool,
    clock: Callable[[], float] | None,
) -> _Call:
    """`clock`: to find out how many calls make a round; None for a candidate that is long enough."""
    if device.type != "cuda" and clock is None:
        return _Call(candidate, 1, "clock")
    if device.type != "cuda":
        assert clock is not None
        took = _time_once(candidate, device, clock)
        count = min(MOST, max(1, round(ROUND / took))) if took > 0 else MOST
        return _Call(_repeated(candidate, count), count, "clock")
    if not graphs:
        return _Call(candidate, 1, "events")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            for _ in range(CALLS):
                candidate()
    except RuntimeError:  # it waits for the device, or allocates outside of torch
        torch.cuda.synchronize(device)
        return _Call(candidate, 1, "events")
    graph.replay()
    return _Call(graph.replay, CALLS, "graph")


def _repeated(candidate: Callable[[], object], count: int) -> Callable[[], object]:
    def run() -> None:
        for _ in range(count):
            candidate()

    return candidate if count == 1 else run


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


def _summary(values: list[float], how: str) -> Timing:
    ordered = torch.tensor(values, dtype=torch.float64)
    p20, median, p80 = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return Timing(float(p20), float(median), float(p80), len(values), how)
