"""Static activation ranges: from statistics, or searched on sampled rows.

All work on what the quantizer sees, the input after shift and smoothing. A searched range clips; min-max never does.
Candidates are judged through the int8 quantizer that runs, which widens a range to hold zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

import ditq_kernels as k
from ditq_converters.methods.base import Transform

SHRINKS = tuple(1 - m / 100 for m in range(80))  # Q-Diffusion, arXiv:2302.04304
QDIFF_POWER = 2.4
QUANTILES = (0.999, 0.9999, 0.99999)  # PTQ4DiT, arXiv:2405.16005

Range = tuple[torch.Tensor, torch.Tensor]  # low, high


def after(
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    transform: Transform,
    group_of_call: Sequence[int],
) -> Range:
    """Statistics of (X - shift) / smooth from those of X, exactly: the map rises in every channel.

    Args:
        minimum: [T, K] fp32 of X, per call and channel.
        maximum: [T, K] fp32.
        transform: of the site.
        group_of_call: [T] timestep group of every call.

    Returns:
        minimum, maximum: [T, K] fp64.
    """
    return transform.apply(minimum, group_of_call), transform.apply(maximum, group_of_call)


def minmax(minimum: torch.Tensor, maximum: torch.Tensor) -> Range:
    """The per-tensor range of all calls and channels, fp32 scalars from [T, K] float."""
    return minimum.min().float(), maximum.max().float()


def qdiff_mse(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Range:
    """Shrink a range to the least mean |error|^2.4, as Q-Diffusion's code does (arXiv:2302.04304).

    80 factors 1, 0.99, ..., 0.21 act on both ends; the largest of equals wins.

    Args:
        x: float, any shape, sampled rows after the transform.
        low: fp32 scalar, the min-max range to start from.
        high: fp32 scalar.

    Returns:
        low, high: fp32 scalars.
    """
    return _best(x, ((low * shrink, high * shrink) for shrink in SHRINKS), QDIFF_POWER)


def ptq4dit_pct(x: torch.Tensor) -> Range:
    """The quantile pair of least squared error, as PTQ4DiT's code does (arXiv:2405.16005).

    Pairs p and 1 - p for p = 0.999, 0.9999, 0.99999, interpolated linearly; the first of equals wins.

    Args:
        x: float, any shape, sampled rows after the transform.

    Returns:
        low, high: fp32 scalars.
    """
    ordered = x.double().flatten().sort().values
    pairs = ((quantile(ordered, 1 - p), quantile(ordered, p)) for p in QUANTILES)
    return _best(x, pairs, 2.0)


def search(method: str, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Range:
    """The range that a method of `RANGE_METHODS` takes for sampled rows x whose min-max range is [low, high]."""
    return SEARCHES[method](x, low, high)


SEARCHES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Range]] = {
    "minmax": lambda x, low, high: (low, high),
    "qdiff_mse": qdiff_mse,
    "ptq4dit_pct": lambda x, low, high: ptq4dit_pct(x),
}
RANGE_METHODS = tuple(SEARCHES)


def through_quantizer(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The real values that x stands for after int8 in the range [low, high], fp32, the shape of x."""
    scale, zero_point = k.asymmetric_scale(low, high)
    return k.dequantize(k.quantize_asymmetric(x, scale, zero_point), scale, zero_point)


def _best(x: torch.Tensor, candidates: Iterable[Range], power: float) -> Range:
    """The first candidate of least mean |error|^power."""
    x = x.float()
    pairs = list(candidates)
    scores = [
        float((through_quantizer(x, *pair) - x).abs_().pow_(power).mean(dtype=torch.float64))
        for pair in pairs
    ]
    return pairs[scores.index(min(scores))]


def quantile(ordered: torch.Tensor, p: float) -> torch.Tensor:
    """torch.quantile, which refuses more than 2^24 values: fp32 [...] from values [..., n] sorted along n."""
    last = ordered.shape[-1] - 1
    position = p * last
    below = int(position)
    above = min(below + 1, last)
    return torch.lerp(ordered[..., below], ordered[..., above], position - below).float()
