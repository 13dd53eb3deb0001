"""Activations to int8 with one symmetric scale per token: one read of x, one write of q."""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import INT8_MAX, on_device_of, rounded_steps
from ditq_kernels._triton.parts.rows import (
    load_row_part,
    row_parts,
    store_row_part,
    symmetric_scale,
)
from ditq_kernels.launch import tuning


@triton.jit
def _quantize_per_token_kernel(
    x_ptr, smooth_inv_ptr, q_ptr, scale_ptr,  # [T, K] float, [K] fp32, [T, K] int8, [T] fp32
    T, K, stride_xt, stride_qt,
    ROWS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,  # a row is two parts
    GELU: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_a = load_row_part(x_ptr, smooth_inv_ptr, t, T, K, stride_xt, 0, BLOCK_A, GELU)
    absmax = tl.max(tl.abs(x_a), axis=1)
    if BLOCK_B > 0:
        x_b = load_row_part(x_ptr, smooth_inv_ptr, t, T, K, stride_xt, BLOCK_A, BLOCK_B, GELU)
        absmax = tl.maximum(absmax, tl.max(tl.abs(x_b), axis=1))
    scale, inv_scale = symmetric_scale(absmax, ROWS)
    q_a = rounded_steps(x_a, inv_scale, -INT8_MAX, INT8_MAX)
    store_row_part(q_ptr, q_a, t, T, K, stride_qt, 0, BLOCK_A)
    if BLOCK_B > 0:
        q_b = rounded_steps(x_b, inv_scale, -INT8_MAX, INT8_MAX)
        store_row_part(q_ptr, q_b, t, T, K, stride_qt, BLOCK_A, BLOCK_B)
    tl.store(scale_ptr + t, scale, mask=t < T)


def launch(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None,
    gelu: bool = False,
    config: tuning.RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments as in `ops.quantize_per_token`; `gelu` goes before the smoothing."""
    num_tokens, in_features = x.shape
    q = torch.empty((num_tokens, in_features), dtype=torch.int8, device=x.device)
    scale = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return q, scale
    if config is None:
        tables = tuning.tables_of(x.device)
        config = tuning.row_config("quantize_per_token", tables, num_tokens, in_features)
    block_a, block_b = row_parts(in_features)
    with on_device_of(x):
        _quantize_per_token_kernel[(triton.cdiv(num_tokens, config.rows),)](
            x, smooth_inv, q, scale,
            num_tokens, in_features, x.stride(0), q.stride(0),
            ROWS=config.rows, BLOCK_A=block_a, BLOCK_B=block_b, GELU=gelu,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return q, scale
