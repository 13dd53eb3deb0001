"""Quantize and dequantize in one go: real values in, the real values that their codes stand for out, in float."""

from __future__ import annotations

from collections.abc import Callable

import torch

import ditq_kernels as k

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def asymmetric(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes 0 to 2^bits - 1 with an integer zero point; zero is always inside the range, and exact.

    Args:
        x: float.
        low: range of x, broadcasts against it.
        high: same.
        bits: of a code.

    Returns:
        The dtype and shape of x.
    """
    codes, zero, scale = asymmetric_codes(x, low, high, bits)
    return (codes - zero) * scale


def asymmetric_codes(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes, zero points and scales behind `asymmetric`, all in the dtype of x; x = (codes - zero) scale."""
    levels = 2**bits - 1
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / levels).clamp_min(k.MIN_SCALE)
    inverse = 1 / scale
    zero = (-low * inverse).round().clamp(0, levels)
    return ((x * inverse).round() + zero).clamp(0, levels), zero, scale


def symmetric(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes -(2^(bits-1) - 1) to 2^(bits-1) - 1 without zero point, for the larger end of the range."""
    largest = 2 ** (bits - 1) - 1
    scale = (torch.maximum(low.abs(), high.abs()) / largest).clamp_min(k.MIN_SCALE)
    return (x / scale).round().clamp(-largest, largest) * scale


def ditas_code(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """DiTAS's released code: a step of range / 2^bits, so that the largest values clip; zero need not be inside.

    s = (high - low) / 2^b, o = round(low / s) s, v = clamp(round((x - o) / s), 0, 2^b - 1), value v s + o. A range of
    width 0, where the code divides by zero, keeps its value.
    """
    step = (high - low) / 2**bits
    flat = step == 0
    step = torch.where(flat, torch.ones_like(step), step)
    offset = torch.where(flat, low, (low / step).round() * step)
    return ((x - offset) / step).round().clamp(0, 2**bits - 1) * step + offset


RULES: dict[str, Rule] = {
    "asymmetric": asymmetric,
    "symmetric": symmetric,
    "ditas_code": ditas_code,
}
