"""Switches of a packed model at run time. They choose among implementations that exist; nothing falls back."""

from __future__ import annotations

from typing import Any

import ditq_kernels as k
from ditq_runtime.families.fusible import FUSION, examine, fusible_blocks, why_not
from ditq_runtime.linear import QuantLinear

LINEAR = ("auto", "reference", "triton")


def configure(
    model: Any, linear: str = "auto", attention: str = "auto", fuse: bool | None = None
) -> str:
    """Say which implementations a packed model must run, or learn that it cannot.

    Args:
        model: a packed transformer, on the device it will run on.
        linear: implementation of the integer linears: `auto` takes what the device runs; `triton` and `reference`
            insist on it.
        attention: `auto` is what the checkpoint says.
        fuse: True: fused blocks wherever a block can run so, which is the default of every model; False: none;
            None: as it is. A block that cannot runs as ever, and `execution_report` says why.

    Returns:
        The implementation of the integer linears, `triton` or `reference`.

    Raises:
        ValueError: not a packed model, an unknown switch, one that the device cannot run, or fuse=True where no block
            can. Nothing is changed then.
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
    runs = {k.backend_of(op, m.weight.device) for m in layers for op in m.format.ops}
    wrong = sorted(runs - {linear})
    if linear != "auto" and wrong:
        device = layers[0].weight.device
        raise ValueError(
            f"configure: linear={linear!r} cannot run on {device}, where the integer linears run on {wrong[0]!r}; "
            "move the model, or take linear='auto'"
        )
    if fuse is not None:
        _switch_fusion(model, fuse)
    return ", ".join(sorted(runs))


def _switch_fusion(model: Any, fuse: bool) -> None:
    blocks = fusible_blocks(model)
    before = {name: getattr(block, FUSION).wanted for name, block in blocks.items()}
    for block in blocks.values():
        getattr(block, FUSION).wanted = fuse
        examine(block)
    reasons = {name: why_not(block) for name, block in blocks.items()}
    if fuse and all(reasons.values()):
        for name, block in blocks.items():
            getattr(block, FUSION).wanted = before[name]
        name, reason = next(iter(reasons.items()), (type(model).__name__, "it has no fused blocks"))
        raise ValueError(f"configure: fuse=True is not possible, {name}: {reason}; take fuse=None")
