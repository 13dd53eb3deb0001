"""Quantizers of rows that do the thing before too: GELU, or layer norm and modulation.

Both take one calibrated scale and zero point, or make a scale per token, with a zero point if asymmetric. What comes
before is fp32 and is not rounded to half precision in between.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ditq_kernels.checks import gemm as checks_gemm
from ditq_kernels.checks import rows as checks_rows
from ditq_kernels.checks import tensors as checks
from ditq_kernels.ops import dispatch


def gelu_quantize(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    asymmetric: bool = False,
) -> tuple[torch.Tensor, ...]:
    """GELU in its tanh form (arXiv:1606.08415), then int8 codes as `quantize_per_token` or `quantize_static` make them.

    GELU is within 2**-21 of |x|, so from device to device a scale may differ by as much, and a code by one.

    Args:
        x: [T, K] fp32 | fp16 | bf16, rows contiguous, finite.
        smooth_inv: [K] fp32. If given, the GELU (minus its shift) is multiplied by it, in fp32.
        scale: [1] fp32, positive, for static codes; absent for a scale per token.
        zero_point: [1] int32 in [-128, 127]; goes with scale.
        group_shift: as in `quantize_per_token`, subtracted from the GELU.
        group_index: as in `quantize_per_token`.
        asymmetric: as in `quantize_per_token`; not together with scale.

    Returns:
        q: [T, K] int8. scale: the one given, or [T] fp32. If asymmetric, zero_point: [T] int32.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or K too large for an int32 sum.
    """
    arguments = (x, smooth_inv, scale, zero_point, group_shift, group_index, asymmetric)
    if (made := dispatch.gelu_quantize.by_plan(arguments)) is not None:
        return _given_or_made(made, scale, asymmetric)
    op = "gelu_quantize"
    checks_rows.check_rows(op, x, smooth_inv, asymmetric)
    checks_rows.check_given_scale(op, x, scale, zero_point, asymmetric)
    checks_rows.check_shift(op, x, group_shift, group_index)
    return _given_or_made(dispatch.gelu_quantize(*arguments), scale, asymmetric)


def adaln_quantize(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor,
    smooth_inv: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    values_dtype: torch.dtype | None = None,
    asymmetric: bool = False,
) -> tuple[Any, ...]:
    """Adaptive layer norm in canonical form (HTG, arXiv:2503.06930, Eq. 11), then int8 codes.

    y = (x - mean) / sqrt(variance + eps) * multiplier + (shift - group_shift[group]), all fp32, without affine
    parameters; then `quantize_per_token(y, smooth_inv)`, asymmetric or not, or `quantize_static(y, scale, zero_point,
    smooth_inv)`, bit for bit. The sums of mean and variance may be taken in any order, so y may differ in its last
    bits from device to device.

    Args:
        x: [T, K] fp32 | fp16 | bf16, rows contiguous, finite. The residual stream.
        multiplier: [B, K] fp32, rows contiguous; (1 + adaln_scale) over the smoothing, stored directly. B divides T,
            and sample b is rows b * T / B and on.
        shift: [B, K] fp32, rows contiguous.
        smooth_inv: [K] fp32. If given, y is multiplied by it before it is quantized.
        eps: added to the variance.
        group_shift: [G, K] fp32, contiguous. A shift per timestep group, subtracted.
        group_index: [B] int64 in 0..G-1, read on the device and not checked; goes with group_shift.
        scale: [1] fp32, positive, for static codes; absent for a scale per token.
        zero_point: [1] int32 in [-128, 127]; goes with scale.
        values_dtype: fp32 | fp16 | bf16: return y too, before smooth_inv. Absent: it is never written.
        asymmetric: as in `quantize_per_token`; not together with scale.

    Returns:
        q: [T, K] int8. scale: the one given, or [T] fp32. If asymmetric, zero_point: [T] int32. y: [T, K]
        values_dtype, or None.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or K too large for an int32 sum.
    """
    arguments = (
        x, multiplier, shift, eps, smooth_inv, group_shift, group_index, scale, zero_point, values_dtype,
        asymmetric,
    )  # fmt: skip
    if (made := dispatch.adaln_quantize.by_plan(arguments)) is not None:
        return _with_values(made, scale, values_dtype, asymmetric)
    op = "adaln_quantize"
    checks_rows.check_rows(op, x, smooth_inv, asymmetric)
    checks_rows.check_given_scale(op, x, scale, zero_point, asymmetric)
    samples = multiplier.shape[0] if multiplier.dim() else 0
    named = [("multiplier", multiplier, samples), ("shift", shift, samples)]
    if (group_shift is None) != (group_index is None):
        missing = "group_shift" if group_shift is None else "group_index"
        raise ValueError(
            f"{op}: group_shift and group_index go together, {missing} is missing; pass both or neither"
        )
    if group_shift is not None and group_index is not None:
        named.append(("group_shift", group_shift, group_shift.shape[0]))
        checks.check_vector(op, "group_index", group_index, torch.int64, (samples,), like=x)
    for name, tensor, rows in named:
        checks.check_matrix(op, name, tensor, (torch.float32,), "[B, K]")
        checks.check_device(op, name, tensor, x)
        if tensor.shape != (rows, x.shape[1]):
            raise ValueError(
                f"{op}: {name} must be [{rows}, {x.shape[1]}] with one row a sample, got "
                f"{list(tensor.shape)}; pass the modulation of this block"
            )
    if group_shift is not None:
        checks_rows.check_contiguous_shift(op, group_shift)
    checks_gemm.check_samples(op, "multiplier", samples, x.shape[0])
    if values_dtype is not None:
        checks.check_out_dtype(op, values_dtype)
    return _with_values(dispatch.adaln_quantize(*arguments), scale, values_dtype, asymmetric)


def _with_values(
    made: tuple[torch.Tensor, ...],
    scale: torch.Tensor | None,
    values_dtype: torch.dtype | None,
    asymmetric: bool,
) -> tuple[Any, ...]:
    *codes, values = made
    return *_given_or_made(codes, scale, asymmetric), None if values_dtype is None else values


def _given_or_made(
    made: Sequence[torch.Tensor], scale: torch.Tensor | None, asymmetric: bool
) -> tuple[torch.Tensor, ...]:
    """What the callers of both ops get of codes, scales and zero points, of which the ops leave some empty."""
    codes, scales, zeros = made
    if asymmetric:
        return codes, scales, zeros
    return codes, scales if scale is None else scale
