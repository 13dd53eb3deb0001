"""Switches of a packed model at run time. They choose among implementations that exist; nothing falls back."""

from __future__ import annotations

from typing import Any

import ditq_kernels as k
from ditq_runtime.linear import QuantLinear

LINEAR = ("auto", "reference", "triton")


def configure(model: Any, linear: str = "auto", attention: str = "auto", fuse: bool = False) -> str:
    """Say which implementations a packed model must run, or learn that it cannot.

    Args:
        model: a packed transformer, on the device it will run on.
        linear: implementation of the integer linears: `auto` takes what the device runs; `triton` and `reference`
            insist on it.
        attention: `auto` is what the checkpoint says.
        fuse: fused blocks; none exist for the linears of a checkpoint.

    Returns:
        The implementation of the integer linears, `triton` or `reference`.

    Raises:
        ValueError: not a packed model, an unknown switch, or one that the device cannot run.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and m.format.integer_gemm]
    if not layers:
        raise ValueError(
            f"configure: {type(model).__name__} has no integer linears; load a packed transformer"
        )
    if linear not in LINEAR:
        raise ValueError(f"configure: linear must be one of {', '.join(LINEAR)}, got {linear!r}")
    if attention != "auto":
        raise ValueError(
            f"configure: attention must be 'auto', got {attention!r}; a checkpoint decides how its attention runs"
        )
    if fuse:
        raise ValueError("configure: fuse=True is not available; leave it False")
    runs = {k.backend_of(op, m.weight.device) for m in layers for op in m.format.ops}
    wrong = sorted(runs - {linear})
    if linear != "auto" and wrong:
        device = layers[0].weight.device
        raise ValueError(
            f"configure: linear={linear!r} cannot run on {device}, where the integer linears run on {wrong[0]!r}; "
            "move the model, or take linear='auto'"
        )
    return ", ".join(sorted(runs))
