"""What calls of a pipeline are given, looked at before the first: forms, numbers, names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

WITHIN_TRAINED = ("DDIMScheduler", "DDPMScheduler")  # schedulers that refuse more steps, late
SEED = "seed"  # what an entry may hold instead of a generator, or of one per sample: an integer, a list of them


def check_known(
    where: str, pipe: Any, takes: Mapping[str, Any], arguments: Mapping[str, Any]
) -> None:
    """ValueError for an argument that the pipeline does not take."""
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values()):
        return
    for name in arguments:
        if name not in takes and name != SEED:
            raise ValueError(
                f"{where}: {type(pipe).__name__} takes no argument {name!r}; its arguments are {', '.join(takes)}"
            )


def check_complete(
    where: str, pipe: Any, takes: Mapping[str, Any], arguments: Mapping[str, Any]
) -> None:
    """ValueError for an argument that the pipeline cannot do without, and for numbers that are none."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    for name, parameter in takes.items():
        needed = parameter.default is parameter.empty and parameter.kind in kinds
        if needed and name not in arguments:
            raise ValueError(f"{where}: {type(pipe).__name__} needs {name}, which is missing")
    for name, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {name} must be a finite number, got {value}")


def check_steps(where: str, pipe: Any, arguments: Mapping[str, Any]) -> None:
    """ValueError for more steps than the scheduler can make of the timesteps that the model was trained with."""
    scheduler: Any = getattr(pipe, "scheduler", None)
    steps = arguments.get("num_inference_steps")
    if type(scheduler).__name__ not in WITHIN_TRAINED or not isinstance(steps, int):
        return
    most = scheduler.config.num_train_timesteps
    if steps > most:
        raise ValueError(f"{where}: at most {most} steps, as the model was trained, got {steps}")


def check_entries(caller: str, inputs: Any) -> None:
    """ValueError for anything but calls one after the other, each with its arguments by name."""
    listed = isinstance(inputs, Sequence)
    strange = [one for one in inputs if not isinstance(one, Mapping)] if listed else [inputs]
    if strange:
        raise ValueError(
            f"{caller}: inputs must be a list with the arguments of each call by name, got {str(strange[0])[:60]}"
        )


def check_positive(caller: str, **counts: int | None) -> None:
    """ValueError for a count that is no whole number of at least 1."""
    for name, count in counts.items():
        if count is not None and not isinstance(count, Integral):
            raise ValueError(f"{caller}: {name} must be a whole number, got {count!r}")
        if count is not None and count < 1:
            raise ValueError(f"{caller}: {name} must be at least 1, got {count}")
