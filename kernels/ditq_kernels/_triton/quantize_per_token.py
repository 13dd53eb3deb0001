"""Activations to int8 with one scale per token: one read of x, one write of q."""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import on_device_of, run_kernel
from ditq_kernels._triton.parts.rows import (
    prepared_row_part,
    row_parts,
    stages_before,
    store_token_codes,
)
from ditq_kernels.launch import tuning


@triton.jit
def _quantize_per_token_kernel(
    x_ptr, q_ptr, scale_ptr, zero_point_ptr,  # [T, K] float, [T, K] int8, [T] fp32, [T] int32 or None: symmetric
    before,  # a Before
    T, K, stride_xt, stride_qt,
    ROWS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,  # a row is two parts
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_a = prepared_row_part(x_ptr, before, t, T, K, stride_xt, 0, BLOCK_A)
    x_b = x_a
    if BLOCK_B > 0:
        x_b = prepared_row_part(x_ptr, before, t, T, K, stride_xt, BLOCK_A, BLOCK_B)
    store_token_codes(
        x_a, x_b, q_ptr, scale_ptr, zero_point_ptr, t, T, K, stride_qt, ROWS, BLOCK_A, BLOCK_B
    )


def launch(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    asymmetric: bool = False,
    gelu: bool = False,
    config: tuning.RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments as in `quantize.quantize_per_token`; `gelu` goes before the shift.

    Zero points of symmetric codes are empty.
    """
    num_tokens, in_features = x.shape
    q = torch.empty((num_tokens, in_features), dtype=torch.int8, device=x.device)
    scale = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    zero_point = torch.empty(num_tokens if asymmetric else 0, dtype=torch.int32, device=x.device)
    if num_tokens == 0:
        return q, scale, zero_point
    if config is None:
        tables = tuning.tables_of(x.device)
        config = tuning.row_config("quantize_per_token", tables, num_tokens, in_features)
    block_a, block_b = row_parts(in_features)
    with on_device_of(x):
        run_kernel(
            _quantize_per_token_kernel, (triton.cdiv(num_tokens, config.rows),),
            x, q, scale, zero_point if asymmetric else None,
            stages_before(num_tokens, config.rows, gelu, smooth_inv, group_shift, group_index),
            num_tokens, in_features, x.stride(0), q.stride(0),
            ROWS=config.rows, BLOCK_A=block_a, BLOCK_B=block_b,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return q, scale, zero_point
