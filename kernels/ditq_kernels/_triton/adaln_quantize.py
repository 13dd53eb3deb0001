"""Layer norm, modulation and quantization of rows: one read of the residual stream, one write of codes."""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import on_device_of, run_kernel, static_codes
from ditq_kernels._triton.parts.rows import (
    load_row_part,
    load_vectors,
    row_parts,
    store_row_part,
    store_token_codes,
)
from ditq_kernels.launch import tuning


@triton.jit
def centred_part(x, mean, K, START: tl.constexpr, BLOCK: tl.constexpr):
    """Minus the mean; zero past the end of the row."""
    k = START + tl.arange(0, BLOCK)
    return tl.where((k < K)[None, :], x - mean[:, None], 0.0)


@triton.jit
def modulated_part(
    centred, inv_deviation, sample, multiplier_ptr, shift_ptr, group_shift_ptr, group_index_ptr,
    smooth_inv_ptr, values_ptr, t, T, K, stride_mb, stride_sb, stride_vt,
    START: tl.constexpr, BLOCK: tl.constexpr, ONE_SAMPLE: tl.constexpr,
):  # fmt: skip
    """Normalized times multiplier plus shift, kept if asked, then smoothed; fp32 [ROWS, BLOCK]."""
    k = START + tl.arange(0, BLOCK)
    multiplier = load_vectors(multiplier_ptr, sample, stride_mb, k, K, ONE_SAMPLE)
    shift = load_vectors(shift_ptr, sample, stride_sb, k, K, ONE_SAMPLE)
    if group_shift_ptr is not None:
        group = tl.load(group_index_ptr + sample)
        shift -= load_vectors(group_shift_ptr, group, K, k, K, ONE_SAMPLE)
    y = centred * inv_deviation[:, None] * multiplier + shift
    if values_ptr is not None:
        inside = (t < T)[:, None] & (k < K)[None, :]
        at = values_ptr + (t.to(tl.int64) * stride_vt)[:, None] + k[None, :]
        tl.store(at, y.to(values_ptr.dtype.element_ty), mask=inside)
    if smooth_inv_ptr is not None:
        y *= tl.load(smooth_inv_ptr + k, mask=k < K, other=0.0)[None, :]
    return y


@triton.jit
def _adaln_quantize_kernel(
    x_ptr, multiplier_ptr, shift_ptr,  # [T, K] float, [B, K] fp32 twice
    group_shift_ptr, group_index_ptr, smooth_inv_ptr,  # [G, K] fp32, [B] int64, [K] fp32, each or None
    in_scale_ptr, in_zero_point_ptr,  # [1] fp32 and int32 for static codes, else None
    q_ptr, scale_ptr, zero_point_ptr, values_ptr,  # [T, K] int8, [T] fp32, [T] int32, [T, K] float, each or None
    eps, T, K, rows_per_sample, stride_xt, stride_mb, stride_sb, stride_qt, stride_vt,
    ONE_SAMPLE: tl.constexpr,  # ROWS divides rows_per_sample
    ROWS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,  # a row is two parts
):  # fmt: skip
    first_t = tl.program_id(0) * ROWS
    t = first_t + tl.arange(0, ROWS)
    real_t = tl.minimum(t, T - 1)
    sample = (first_t if ONE_SAMPLE else real_t) // rows_per_sample
    sample = sample.to(tl.int64)
    width = tl.full((ROWS,), 1.0, tl.float32) * K
    x_a = load_row_part(x_ptr, t, T, K, stride_xt, 0, BLOCK_A)  # [ROWS, BLOCK_A]
    total = tl.sum(x_a, axis=1)
    if BLOCK_B > 0:
        x_b = load_row_part(x_ptr, t, T, K, stride_xt, BLOCK_A, BLOCK_B)
        total += tl.sum(x_b, axis=1)
    mean = tl.div_rn(total, width)
    x_a = centred_part(x_a, mean, K, 0, BLOCK_A)
    total = tl.sum(x_a * x_a, axis=1)
    if BLOCK_B > 0:
        x_b = centred_part(x_b, mean, K, BLOCK_A, BLOCK_B)
        total += tl.sum(x_b * x_b, axis=1)
    deviation = tl.sqrt_rn(tl.div_rn(total, width) + eps)
    inv_deviation = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), deviation)
    y_a = modulated_part(
        x_a, inv_deviation, sample, multiplier_ptr, shift_ptr, group_shift_ptr, group_index_ptr,
        smooth_inv_ptr, values_ptr, t, T, K, stride_mb, stride_sb, stride_vt, 0, BLOCK_A, ONE_SAMPLE,
    )  # fmt: skip
    if BLOCK_B > 0:
        y_b = modulated_part(
            x_b, inv_deviation, sample, multiplier_ptr, shift_ptr, group_shift_ptr, group_index_ptr,
            smooth_inv_ptr, values_ptr, t, T, K, stride_mb, stride_sb, stride_vt,
            BLOCK_A, BLOCK_B, ONE_SAMPLE,
        )  # fmt: skip
    if in_scale_ptr is None:  # y is zero past the end: nothing there was loaded
        if BLOCK_B == 0:
            y_b = y_a
        store_token_codes(
            y_a, y_b, q_ptr, scale_ptr, zero_point_ptr, t, T, K, stride_qt, ROWS, BLOCK_A, BLOCK_B
        )
    else:
        q_a = static_codes(y_a, in_scale_ptr, in_zero_point_ptr)
        if BLOCK_B > 0:
            q_b = static_codes(y_b, in_scale_ptr, in_zero_point_ptr)
        store_row_part(q_ptr, q_a, t, T, K, stride_qt, 0, BLOCK_A)
        if BLOCK_B > 0:
            store_row_part(q_ptr, q_b, t, T, K, stride_qt, BLOCK_A, BLOCK_B)


def launch(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None,
    group_index: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    values_dtype: torch.dtype | None,
    asymmetric: bool = False,
    config: tuning.RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments as in `row_fused.adaln_quantize`. Outputs that were not asked for are empty."""
    num_tokens, in_features = x.shape
    q = torch.empty((num_tokens, in_features), dtype=torch.int8, device=x.device)
    scales = torch.empty(
        num_tokens if scale is None else 0, dtype=torch.float32, device=x.device
    )
    zeros = torch.empty(num_tokens if asymmetric else 0, dtype=torch.int32, device=x.device)
    values = torch.empty(
        (0 if values_dtype is None else num_tokens, in_features),
        dtype=values_dtype or torch.float32, device=x.device,
    )  # fmt: skip
    if num_tokens == 0:
        return q, scales, zeros, values
    if config is None:
        tables = tuning.tables_of(x.device)
        config = tuning.row_config("adaln_quantize", tables, num_tokens, in_features)
    block_a, block_b = row_parts(in_features)
    rows_per_sample = num_tokens // multiplier.shape[0]
    with on_device_of(x):
        run_kernel(
            _adaln_quantize_kernel, (triton.cdiv(num_tokens, config.rows),),
            x, multiplier, shift, group_shift, group_index, smooth_inv, scale, zero_point,
            q, scales if scale is None else None, zeros if asymmetric else None,
            None if values_dtype is None else values,
            eps, num_tokens, in_features, rows_per_sample,
            x.stride(0), multiplier.stride(0), shift.stride(0), q.stride(0), values.stride(0),
            ONE_SAMPLE=rows_per_sample % config.rows == 0,
            ROWS=config.rows, BLOCK_A=block_a, BLOCK_B=block_b,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return q, scales, zeros, values
