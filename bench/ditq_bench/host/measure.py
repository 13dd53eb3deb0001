"""The host's part of every op, as ratios to a small linear on a CPU: the yardstick moves with the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ditq_kernels.launch import plans

ROUNDS, CALLS, WARM_UP = 15, 300, 3
LONGEST = 20  # linears; calls that cost more run less often


@dataclass(frozen=True)
class HostCost:
    """What one call costs the host.

    Attributes:
        call: a name of `cases.calls` or `models.steps`.
        direct: by a kept plan: median over rounds of its time / that of the linear next to it.
        dispatcher: through torch's dispatcher, with all checks.
        spread: of `direct` over rounds: what lies between its fifths / the median.
    """

    call: str
    direct: float
    dispatcher: float
    spread: float


def host_costs(
    device: torch.device,
    cases: dict[str, Callable[[], Any]],
    advance: Callable[[], None],
    rounds: int = ROUNDS,
) -> list[HostCost]:
    """Measure every call, in this process' own time; on a GPU launches must not wait, so rounds are short.

    Args:
        device: of the operands.
        cases: name -> a call.
        advance: called after each call's rounds.
        rounds: of all ways to call, one after the other.
    """
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for name, call in cases.items():
                for _ in range(WARM_UP):
                    call()
                ways = (call, _without_plans(call))
                direct, dispatcher = _ratios(ways, device, rounds)
                middle = statistics.median(direct)
                found.append(
                    HostCost(name, middle, statistics.median(dispatcher), _spread(direct) / middle)
                )
                advance()
    finally:
        torch.set_num_threads(threads)
    return found


def _without_plans(call: Callable[[], Any]) -> Callable[[], Any]:
    def through_dispatcher() -> Any:
        plain, plans.plain = plans.plain, lambda: False
        try:
            return call()
        finally:
            plans.plain = plain

    return through_dispatcher


def _spread(ratios: list[float]) -> float:
    """What lies between the 20th and the 80th percentile."""
    low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive")
    return high - low


def _ratios(
    ways: tuple[Callable[[], Any], ...], device: torch.device, rounds: int
) -> list[list[float]]:
    """Ratios of each way to the linear that ran just before it, one a round."""
    x, weight = torch.ones(2, 16), torch.ones(16, 16)

    def linear() -> torch.Tensor:
        return torch.nn.functional.linear(x, weight)

    # a step costs what thousands of linears cost: as much time as theirs is enough
    once = _seconds(ways[0], device, 1) / _seconds(linear, device, CALLS)
    count = max(1, min(CALLS, round(CALLS * LONGEST / once)))
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, ratios in zip(ways, found, strict=True):
            unit = _seconds(linear, device, CALLS)
            ratios.append(_seconds(way, device, count) / unit)
    return found


def _seconds(call: Callable[[], Any], device: torch.device, count: int) -> float:
    """Of this process, without its waiting for others."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count
