"""Static scales of quantized attention, from the calibration."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

import ditq_kernels as k
from ditq_converters.calibrate.stats import CalibrationStats, StatisticsError
from ditq_converters.methods import BlockTransform, Transform, ranges
from ditq_converters.plan.plan import Part
from ditq_runtime.families import BlockTable, ValueRows
from ditq_runtime.format.attention import CORE


def static_scales(
    model: nn.Module,
    table: BlockTable,
    part: Part,
    stats: CalibrationStats | None,
    choice: BlockTransform,
) -> dict[str, torch.Tensor]:
    """Full tensor name -> scale fp32 [H], symmetric, of the operands that the static formats of a block store.

    V is what the attention sees: after the shift and the factor that its projection absorbs for the output
    projection. Q and K absorb nothing.

    Args:
        model: the float transformer.
        table: of the block.
        part: its entries of the plan.
        stats: with the ranges of Q, K and V, where an entry is static.
        choice: what the methods decided for the block.
    """
    scales = {}
    for name, entry in part.attention.items():
        attn = cast("Any", model.get_submodule(name))
        stored = {} if entry.format is None else entry.format.tensors(attn.heads)
        only = entry.only_call
        calls = slice(None) if only is None else slice(only, only + 1)
        for field, (_, (heads,)) in stored.items():
            assert stats is not None
            operand = field[0]
            low, high = (side[calls] for side in _ranges(stats, f"{name}.{operand}"))
            if operand == "v":
                folded = _of_values(table, part, f"{name}.to_v", choice, low.shape[1])
                low, high = ranges.after(low, high, folded, choice.group_of_call[calls])
            absmax = torch.maximum(low.abs(), high.abs()).amax(0)  # [H * D]
            scales[f"{name}.{CORE}.{field}"] = k.symmetric_scale(absmax.view(heads, -1).amax(1))
    return scales


def _ranges(stats: CalibrationStats, operand: str) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return stats.ranges(operand)
    except StatisticsError as error:
        raise StatisticsError(
            f"{error}; attention that was called with a mask per query or head has none, and stays float: take "
            "--attention none, or values none in the plan"
        ) from error


def _of_values(
    table: BlockTable, part: Part, value: str, choice: BlockTransform, width: int
) -> Transform:
    """The transform that a value projection of `width` rows absorbs: that of the site behind the attention."""
    for site in table.sites:
        entry = part.sites[site.name]
        if entry.place == "quantizer" or not isinstance(site.producer, ValueRows):
            continue
        block = entry.name.removesuffix(f".{site.name}")
        if value in [f"{block}.{name}" for name in site.producer.values]:
            transform = choice.sites.get(site.name, Transform())
            smooth, shift = transform.smooth, transform.shift
            return Transform(
                None if smooth is None else smooth[:width],
                None if shift is None else shift[:, :width],
            )
    return Transform()
