"""Quantizers of rows of activations: a scale for each token, with or without a zero point, or calibrated scales.

A site's transform comes before: x' = (x - shift) * smooth_inv, two fp32 roundings, with a shift for each timestep
group (HTG, arXiv:2503.06930) or one for all. What it takes away, a linear's
bias gives back.
"""

from typing import Literal, overload

import torch

from ditq_kernels.checks import rows as checks_rows
from ditq_kernels.checks import tensors as checks
from ditq_kernels.ops import dispatch


@overload
def quantize_per_token(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None = None,
    *,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    asymmetric: Literal[False] = False,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def quantize_per_token(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None = None,
    *,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    asymmetric: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def quantize_per_token(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None = None,
    *,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    asymmetric: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Quantize each token to int8 with its own scale (SmoothQuant, arXiv:2211.10438, Eq. 1).

    Symmetric: q = clamp(round(x * (1 / scale)), -127, 127), scale = max(max|x| / 127, 2**-40).
    Asymmetric: with low = min(0, min x) and high = max(0, max x), scale = max((high - low) / 255, 2**-40),
    zero_point = clamp(round(-low * (1 / scale)), 0, 255) - 128, q = zero_point + round(x * (1 / scale)), clamped to
    [-128, 127]. All fp32, ties to even. We depart from the paper: x is multiplied by the rounded reciprocal, not
    divided by the scale.

    Args:
        x: [T, K] fp32 | fp16 | bf16, rows contiguous, finite. Activations.
        smooth_inv: [K] fp32. If given, x (minus its shift) is first multiplied by it, in fp32.
        group_shift: [G, K] fp32, contiguous. A shift per timestep group, subtracted before all else, in fp32.
        group_index: [B] int64 in 0..G-1, read on the device and not checked: the group of each sample, where sample b
            is rows b * T / B and on. B divides T; B = T gives each token its own. Absent: G is 1.
        asymmetric: give each token a zero point, too.

    Returns:
        q: [T, K] int8. scale: [T] fp32, in units of x (times smooth_inv). If asymmetric, zero_point: [T] int32 in
        [-128, 127], the stored code of 0.0.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or K too large for an int32 sum.
    """
    arguments = (x, smooth_inv, group_shift, group_index, asymmetric)
    if (made := dispatch.quantize_per_token.by_plan(arguments)) is not None:
        return made if asymmetric else made[:2]
    op = "quantize_per_token"
    checks_rows.check_rows(op, x, smooth_inv, asymmetric=asymmetric)
    checks_rows.check_shift(op, x, group_shift, group_index)
    codes, scale, zero_point = dispatch.quantize_per_token(*arguments)
    return (codes, scale, zero_point) if asymmetric else (codes, scale)


def quantize_static(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    smooth_inv: torch.Tensor | None = None,
    *,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize activations to int8 with calibrated scales: one, or one for each head.

    q = zero_point + round(x * (1 / scale)), clamped to [-128, 127], all fp32, ties to even.

    Args:
        x: [T, K] fp32 | fp16 | bf16, rows contiguous, finite. Activations.
        scale: [1] or [H] fp32, positive, in units of x (times smooth_inv). H divides K: each head is K / H
            neighbouring columns.
        zero_point: [1] int32 in [-128, 127]. The stored code of 0.0; absent means 0.
        smooth_inv: [K] fp32. If given, x (minus its shift) is first multiplied by it, in fp32.
        group_shift: as in `quantize_per_token`.
        group_index: as in `quantize_per_token`.

    Returns:
        [T, K] int8 in [-128, 127].

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or K too large for an int32 sum.
    """
    arguments = (x, scale, zero_point, smooth_inv, group_shift, group_index)
    if (made := dispatch.quantize_static.by_plan(arguments)) is not None:
        return made
    op = "quantize_static"
    checks_rows.check_rows(op, x, smooth_inv)
    checks_rows.check_shift(op, x, group_shift, group_index)
    checks.check_head_scales(op, scale, like=x)
    if zero_point is not None:
        checks.check_vector(op, "zero_point", zero_point, torch.int32, (1,), like=x)
    return dispatch.quantize_static(*arguments)
