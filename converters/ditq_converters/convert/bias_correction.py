"""Empirical bias correction: take the mean output error of a linear back through its bias.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv:1906.04721, section 4.2 and
appendix D. We depart in two things: the inputs are those of the float model for every layer, so that layers are
independent of each other, and a bias per timestep group is corrected by the rows of that group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ditq_converters.convert.emulated import playable
from ditq_converters.convert.fold import LinearTensors
from ditq_runtime.format.layer import LayerFormat

CHUNK = 512  # rows whose outputs are held at once


@dataclass(frozen=True)
class SampledRows:
    """Inputs of a linear to correct it by.

    Attributes:
        x: [R, K] fp64, as the folded weight sees them: shifted and smoothed.
        group: [R] int64, timestep group of every row, by falling timestep.
        seen: [R, K] fp64, what the packed linear reads at the same tokens; None: the same.
    """

    x: torch.Tensor
    group: torch.Tensor
    seen: torch.Tensor | None = None


def corrected_bias(
    linear: LinearTensors,
    layer_format: LayerFormat,
    stored: dict[str, torch.Tensor],
    quantizer: dict[str, torch.Tensor],
    rows: SampledRows,
) -> torch.Tensor:
    """The bias with which the mean output on the rows is that of the float layer: b + mean(X W^T - Xq Wq^T).

    Xq Wq^T is what the packed layer computes: its activation quantizer, codes and branch, without bias.
    One bias is corrected by all rows, a table by each group's own; a group without rows takes the mean over all.

    Args:
        linear: folded weight [N, K] and bias [G, N], fp64, groups by rising timestep.
        layer_format: of the packed layer.
        stored: its tensors.
        quantizer: those of the site it reads; the rows are transformed already.
        rows: inputs.

    Returns:
        fp32, the shape of `stored["bias"]`: [N] or [G, N].
    """
    assert linear.bias is not None
    groups, (outputs, inputs) = len(linear.bias), linear.weight.shape
    bare = replace(layer_format, bias=False, groups=1)
    kept = {name: tensor for name, tensor in stored.items() if name != "bias"}
    layer = playable(inputs, outputs, bare, kept, quantizer)
    group = groups - 1 - rows.group if groups > 1 else torch.zeros_like(rows.group)
    total = torch.zeros(groups, outputs, dtype=torch.float64)
    read = rows.x if rows.seen is None else rows.seen
    parts = zip(rows.x.split(CHUNK), read.split(CHUNK), group.split(CHUNK), strict=True)
    for x, seen, of in parts:
        error = x @ linear.weight.T - layer(seen.float()).double()
        total.index_add_(0, of, error)
    count = torch.bincount(group, minlength=groups)[:, None]
    mean = torch.where(count > 0, total / count.clamp(min=1), total.sum(0) / len(group))
    return (linear.bias + mean).float().reshape(stored["bias"].shape)
