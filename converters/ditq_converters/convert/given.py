"""What `convert` is given, looked at before any work: types of its arguments, and the size of shards."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ditq_converters.plan.plan import Plan
from ditq_converters.plan.recipe import Recipe

READ = ("ranges", "rows", "check_model")  # what `convert` reads of statistics, whoever made them
SIZE = re.compile(r"[1-9]\d*\s*[KMGT]B", re.IGNORECASE)


def check_given(plan: Any, stats: Any, out: Any, max_shard_size: Any) -> None:
    """ValueError for an argument that is not what `convert` takes."""
    plans = list(plan.values()) if isinstance(plan, Mapping) else [plan]
    for one in plans:
        if not isinstance(one, Plan | Recipe):
            raise ValueError(
                f"convert: plan must be a Plan, a Recipe, or component -> its plan, got {_shown(plan)}; "
                "make one with make_plan or Recipe"
            )
    if stats is not None and not all(hasattr(stats, name) for name in READ):
        raise ValueError(
            f"convert: stats must be what calibrate returned, got {_shown(stats)}; open a folder with "
            "CalibrationStats.open(folder)"
        )
    if out is not None and not isinstance(out, str | os.PathLike):
        raise ValueError(f"convert: out must be the path of a folder, got {_shown(out)}")
    positive = isinstance(max_shard_size, int) and max_shard_size > 0
    if not positive and not SIZE.fullmatch(str(max_shard_size)):
        raise ValueError(
            f"convert: max_shard_size must be a size such as 10GB or 500MB, got {max_shard_size!r}"
        )


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]
