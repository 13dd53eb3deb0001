"""The workshop: turn a float Diffusion Transformer into a packed low-bit checkpoint, offline.

from ditq_converters import calibrate, convert, evaluate, make_plan, open_model
pipe = open_model("demo:digits")
stats = calibrate(pipe, out="stats")
plan = make_plan(pipe, stats, method="smoothquant", weights="w4p")
packed = convert(pipe, plan, stats, out="out")
evaluate(packed, pipe, out="report")

Names load when they are used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditq_converters.auto.search import auto_plan
    from ditq_converters.calibrate.run import calibrate
    from ditq_converters.calibrate.stats import CalibrationStats, StatisticsError
    from ditq_converters.convert.story import convert
    from ditq_converters.evaluate.evaluation import evaluate
    from ditq_converters.models.open import open_model
    from ditq_converters.plan.file import read_plan
    from ditq_converters.plan.make import make_plan
    from ditq_converters.plan.plan import Plan
    from ditq_converters.plan.recipe import Recipe

__all__ = [
    "CalibrationStats",
    "Plan",
    "Recipe",
    "StatisticsError",
    "auto_plan",
    "calibrate",
    "convert",
    "evaluate",
    "make_plan",
    "open_model",
    "read_plan",
]

_HOME = {
    "CalibrationStats": "calibrate.stats",
    "Plan": "plan.plan",
    "Recipe": "plan.recipe",
    "StatisticsError": "calibrate.stats",
    "auto_plan": "auto.search",
    "calibrate": "calibrate.run",
    "convert": "convert.story",
    "evaluate": "evaluate.evaluation",
    "make_plan": "plan.make",
    "open_model": "models.open",
    "read_plan": "plan.file",
}


class _Package(ModuleType):
    """Three functions have the names of the wings they live in: as attributes of the package they are the functions."""

    def __getattr__(self, name: str) -> Any:
        """Import an exported name when it is first used."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Importing a wing does not put the module in the function's place."""
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
