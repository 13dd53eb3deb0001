"""What `convert` asks before its long work: can it calibrate, by a schedule that is long enough; how long it takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ditq_converters.calibrate.stats import CalibrationStats
    from ditq_converters.plan.plan import Plan

BUDGET = "memory_budget"  # of a calibration; no part of its inputs
WORTH_TELLING = 10  # seconds


def has_inputs(pipe: Any, calibration: dict[str, Any]) -> bool:
    """Whether a calibration can run: something to call the pipeline with was given, or it draws classes."""
    from ditq_runtime.calls.pipeline import pipeline_of

    if calibration["inputs"] is not None or calibration["prompts"] is not None:
        return True
    try:
        return "class_labels" in inspect.signature(pipeline_of(pipe).__call__).parameters
    except ValueError:  # a transformer alone that no pipeline is known for
        return False


def refuse_groups(pipe: Any, plans: Iterable[Plan], calibration: dict[str, Any]) -> None:
    """More timestep groups than the calibration to come will make calls, as far as the scheduler lets that be known."""
    from ditq_converters.plan.check import check_groups
    from ditq_runtime.calls.inputs import gather
    from ditq_runtime.calls.pipeline import pipeline_of

    grouped = [plan for plan in plans if any(site.options.get("num_groups") for site in plan.sites)]
    if not grouped:
        return
    driven = pipeline_of(pipe)
    given = gather("convert", driven, **{k: v for k, v in calibration.items() if k != BUDGET})
    steps = [count for one in given if (count := one.steps(driven)) is not None]
    scheduler = getattr(driven, "scheduler", None)
    if len(steps) < len(given) or hasattr(scheduler, "prk_timesteps"):  # PNDM begins with more
        return
    calls = max(steps) * getattr(scheduler, "order", 1)
    for plan in grouped:
        check_groups(plan, calls, "the calibration makes")


def tell_time(
    models: dict[str, nn.Module],
    plans: dict[str, Plan],
    stats: CalibrationStats | None,
    searches: bool,
) -> None:
    """Say how long it will take, where that is worth it."""
    from ditq_converters.auto.estimate import seconds_of
    from ditq_converters.progress import note
    from ditq_converters.streaming.model import streamed_of

    if stats is None:
        return
    total = sum(
        seconds_of(plan, models[name], stats.of(name), searches)
        for name, plan in plans.items()
        if streamed_of(models[name]) is None
    )
    if total > WORTH_TELLING:
        note(
            f"rounding takes about {_told(total)} here; `--method smoothquant` takes seconds, and is worse"
        )


def _told(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
