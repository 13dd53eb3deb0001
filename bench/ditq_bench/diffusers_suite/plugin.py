"""A plugin of pytest, for runs of diffusers' tests: their model classes make quantized models.

What their test calls `model_class(**init)` is converted as it is made; everything else of the class is diffusers' own.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401  the installed one, before their conftest puts the source tree's first
import pytest
import torch
from torch import nn

from ditq_bench.diffusers_suite.applies import NOT_APPLICABLE

RESULTS = "DITQ_SUITE_RESULTS"  # environment variable: the file that outcomes are written to
_outcomes: dict[str, tuple[str, str]] = {}


@cache
def quantized(cls: type) -> Any:
    """A class that calls itself as `cls`, makes packed models, and loads as `cls` does."""

    class Meta(type(cls)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
            from ditq_converters import Recipe, convert

            model: nn.Module = convert(cls(*args, **kwargs).eval(), Recipe("linear"), quiet=True)
            return model

        def __instancecheck__(self, instance: object) -> bool:
            return isinstance(instance, cls)

    loaders = ("from_pretrained", "from_config", "from_single_file", "load_config")
    body = {name: getattr(cls, name) for name in loaders if hasattr(cls, name)}
    return Meta(cls.__name__, (cls,), {"__module__": cls.__module__, **body})


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Give each test class the quantized model, and say of each test that does not apply why."""
    seen = set()
    for item in items:
        for base in (getattr(item, "cls", None) and item.cls.__mro__) or ():
            given = vars(base).get("model_class")
            if base not in seen and isinstance(given, property) and _is_concrete(base):
                base.model_class = property(_quantizing(given))
                seen.add(base)
        reason = next((why for test, why in NOT_APPLICABLE if re.search(test, item.nodeid)), None)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"not applicable: {reason}"))


def _is_concrete(base: type) -> bool:
    return base.__name__ != "BaseModelTesterConfig" and not hasattr(base, "made_by_ditq")


def _quantizing(given: property) -> Any:
    assert given.fget is not None
    fget = given.fget
    return lambda self: quantized(fget(self))


def pytest_runtest_setup() -> None:
    """Quiet: a fixed random state before each, as their tests leave it anywhere."""
    torch.manual_seed(0)


def pytest_runtest_logreport(report: Any) -> None:
    """Keep the outcome of each test: that of its call, or of a setup that did not pass."""
    if report.when == "call" or report.outcome != "passed":
        text = report.longrepr
        reason = text[2] if isinstance(text, tuple) else str(text).strip().splitlines()[-1:]
        told = "" if report.outcome == "passed" else str(reason)
        _outcomes[report.nodeid] = (report.outcome, told.removeprefix("Skipped: "))
        text = json.dumps(_outcomes, indent=2) + "\n"  # each time: a run may be stopped
        Path(os.environ[RESULTS]).write_text(text, encoding="utf-8")
