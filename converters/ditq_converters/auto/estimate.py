"""How long a conversion will take on this machine: from what its plan asks for, and two short measurements."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.gptq import compensated_codes, error_feedback
from ditq_converters.convert.jobs import AIMED_CALLS
from ditq_converters.plan.entries import LinearPlan
from ditq_converters.plan.plan import Plan
from ditq_kernels import quantize_weight_w8

SMALL, LARGE = (
    64,
    512,
)  # columns of the weight that is rounded to see how fast that goes, and sides of a product
EMULATED = 3  # a forward in integers on a CPU, in forwards in float
TRIALS = 8  # calls that judge a choice, see `search.CALLS`


def seconds_of(plan: Plan, model: nn.Module, stats: CalibrationStats, searches: bool) -> float:
    """Seconds that a plan's conversion will take, within a factor of about two.

    Args:
        plan: what to convert by.
        model: the float transformer.
        stats: of it.
        searches: bits are searched for first.
    """
    rounded = [entry for entry in plan.linears if entry.rounding in ("gptq", "aimed")]
    if not rounded:
        return 0.0
    rounding = _rounding(rounded)
    if not any(entry.rounding == "aimed" for entry in rounded):
        return rounding
    stats.check_model(model)  # the calls of another one may not be calls of this one
    calls = list(stats.replay())
    forward = _timed(lambda: calls[0].replay(model)) if calls else 0.0
    blocks = max(1, len({site.name.rpartition(".")[0] for site in plan.sites}))
    # up to every block, and through half of it for each of its sites, in float and as packed
    runs = (blocks + 1) / 2 + 0.5 * len(plan.sites) / blocks
    aiming = min(len(calls), AIMED_CALLS) * forward * (1 + EMULATED) * runs
    trying = 2 * (len(plan.sites) + blocks) * TRIALS * forward * EMULATED
    return rounding + aiming + searches * (3 * rounding + trying)


def _rounding(entries: list[LinearPlan]) -> float:
    column, product = _column_seconds(), _product_seconds()
    columns = sum(entry.shape[1] for entry in entries)
    products = sum(k * k * (n + 2 * k) for n, k in (entry.shape for entry in entries))
    return columns * column + products * product


def _column_seconds() -> float:
    weight = torch.linspace(-1, 1, 256 * SMALL).reshape(256, SMALL)
    feedback = error_feedback(torch.eye(SMALL, dtype=torch.float64))
    grid = quantize_weight_w8(weight)
    return _timed(lambda: compensated_codes(weight, feedback, grid)) / SMALL


def _product_seconds() -> float:
    """Of a multiplication and addition in fp64."""
    x = torch.ones(LARGE, LARGE, dtype=torch.float64)
    return _timed(lambda: x @ x) / LARGE**3


def _timed(work: Callable[[], Any]) -> float:
    work()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
