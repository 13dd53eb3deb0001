"""From the float weight of a linear to the stored tensors of its format, rounded to nearest."""

from __future__ import annotations

import torch

import ditq_kernels as k
from ditq_runtime.format.layer import LayerFormat

QuantizedWeight = k.W8 | k.W4P | k.W4G
STORED = {  # tensor -> attribute of the quantized weight
    "w8": {"weight": "qweight", "weight_scale": "scale"},
    "w4p": {
        "weight": "packed",
        "weight_scale": "scale",
        "group_scale": "group_scale",
        "group_offset": "group_offset",
    },
    "w4g": {"weight": "packed", "weight_scale": "scale", "weight_zero": "weight_zero"},
}


def quantize_weight(
    weight: torch.Tensor,
    layer_format: LayerFormat,
    symmetric: bool = False,
    importance: torch.Tensor | None = None,
) -> QuantizedWeight:
    """A weight in the integers of a format.

    Args:
        weight: [N, K] float, finite.
        layer_format: `w8`, `w4p` or `w4g`, with its group size.
        symmetric: `w4g` weights without zero points.
        importance: [K], what squared errors in the columns of `w4p` weigh when its groups are searched; None: alike.
    """
    if layer_format.weights == "w8":
        return k.quantize_weight_w8(weight)
    assert layer_format.group_size is not None
    if layer_format.weights == "w4g":
        return k.quantize_weight_w4g(weight, layer_format.group_size, symmetric)
    return k.quantize_weight_w4p(weight, layer_format.group_size, importance)


def stored_tensors(
    quantized: QuantizedWeight, layer_format: LayerFormat
) -> dict[str, torch.Tensor]:
    """The tensors of `LayerFormat.tensors` that hold a quantized weight."""
    parts = STORED[layer_format.weights]
    return {name: getattr(quantized, part) for name, part in parts.items()}
