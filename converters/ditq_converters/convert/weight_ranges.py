"""Ranges of weights that clip: the best of several for whatever shares a scale, by squared error.

A unit is what shares a scale: a row (`w8`, and `w4p` above its integer group scales), or a group of a row (`w4g`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import torch

from ditq_converters.methods.ranges import QUANTILES, quantile
from ditq_converters.plan.entries import WEIGHT_RANGES
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.stored_weight import QuantizedWeight, quantize_weight

SHRINKS = tuple(1 - m / 20 for m in range(11))  # 1 to 0.5


def _minmax(units: torch.Tensor) -> Iterator[torch.Tensor]:
    yield units


def _mse(units: torch.Tensor) -> Iterator[torch.Tensor]:
    low, high = (units.amin(dim=1, keepdim=True), units.amax(dim=1, keepdim=True))
    for shrink in SHRINKS:
        yield units.clamp(low * shrink, high * shrink)


def _ptq4dit_pct(units: torch.Tensor) -> Iterator[torch.Tensor]:
    ordered = units.double().sort(dim=1).values
    for p in QUANTILES:
        yield units.clamp(quantile(ordered, 1 - p)[:, None], quantile(ordered, p)[:, None])


# name -> units [U, K] to the same clipped, candidate by candidate
CLIPPED: dict[str, Callable[[torch.Tensor], Iterator[torch.Tensor]]] = dict(
    zip(WEIGHT_RANGES, (_minmax, _mse, _ptq4dit_pct), strict=True)
)


def quantize_clipped(
    weight: torch.Tensor,
    layer_format: LayerFormat,
    symmetric: bool,
    ranges: str,
    importance: torch.Tensor | None = None,
) -> QuantizedWeight:
    """A weight in the integers of a format, on scales of the range that suits each unit best.

    Args:
        weight: [N, K] fp32, finite.
        layer_format: `w8`, `w4p` or `w4g`, with its group size.
        symmetric: `w4g` weights without zero points.
        ranges: `minmax`, from the least to the largest value; `mse`, both ends shrunk to 1, 0.95, ..., 0.5 of that; or
            `ptq4dit_pct`, the quantile pairs of PTQ4DiT's code (arXiv:2405.16005), 0.999, 0.9999 and 0.99999. Each is
            the one of least squared error in every unit, the first of equals.
        importance: as in `quantize_weight`, of `minmax` alone.

    Returns:
        Codes and scales; what lies beyond a range takes the code of its end.
    """
    if ranges == "minmax":
        return quantize_weight(weight, layer_format, symmetric, importance)
    if layer_format.weights != "w4g":
        return _best(weight, layer_format, symmetric, ranges)
    assert layer_format.group_size is not None
    found = _best(weight.reshape(-1, layer_format.group_size), layer_format, symmetric, ranges)
    parts = {f.name: getattr(found, f.name) for f in fields(found)}
    return replace(found, **{name: part.reshape(len(weight), -1) for name, part in parts.items()})


def _best(
    units: torch.Tensor, layer_format: LayerFormat, symmetric: bool, ranges: str
) -> QuantizedWeight:
    best: QuantizedWeight | None = None
    least = torch.full((len(units),), torch.inf, dtype=torch.float64)
    for clipped in CLIPPED[ranges](units):
        found = quantize_weight(clipped, layer_format, symmetric)
        error = (found.dequantize().double() - units.double()).square().sum(dim=1)
        better, least = error < least, torch.minimum(error, least)
        best = found if best is None else _where(better, found, best)
    assert best is not None
    return best


def _where(taken: torch.Tensor, one: QuantizedWeight, other: QuantizedWeight) -> QuantizedWeight:
    """Row by row, `one` where `taken` [U], else `other`."""
    parts = {}
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        parts[field.name] = torch.where(taken.reshape(-1, *[1] * (a.dim() - 1)), a, b)
    return type(one)(**parts)
