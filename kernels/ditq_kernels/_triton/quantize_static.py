"""Activations to int8 with calibrated scales, one or one for each head: one read of x, one write of q."""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import asymmetric_codes, on_device_of, run_kernel
from ditq_kernels._triton.parts.rows import (
    prepared_row_part,
    row_parts,
    stages_before,
    store_row_part,
)
from ditq_kernels.launch import tuning


@triton.jit
def _codes(x, scale_ptr, zero_point_ptr, K, START: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Int32 codes of x [rows, BLOCK], the inputs from START on; HEAD_DIM inputs share a scale, or all if it is 0."""
    # div_rn, not `/`: on NVIDIA `/` may be 2 ulp off, and the interpreter does not show it
    if HEAD_DIM == 0:
        inv_scale = tl.div_rn(1.0, tl.load(scale_ptr))
    else:
        k = START + tl.arange(0, BLOCK)
        scale = tl.load(scale_ptr + k // HEAD_DIM, mask=k < K, other=1.0)
        inv_scale = tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), scale)[None, :]
    zero_point = tl.full((), 0, tl.int32)
    if zero_point_ptr is not None:
        zero_point = tl.load(zero_point_ptr)
    return asymmetric_codes(x, inv_scale, zero_point)


@triton.jit
def _quantize_static_kernel(
    x_ptr, scale_ptr, zero_point_ptr, q_ptr,  # [T, K] float, [1] or [H] fp32, [1] int32 or None, [T, K] int8
    before,  # a Before
    T, K, stride_xt, stride_qt,
    ROWS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,  # a row is two parts
    HEAD_DIM: tl.constexpr,  # K / H, 0: one scale
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_a = prepared_row_part(x_ptr, before, t, T, K, stride_xt, 0, BLOCK_A)
    q_a = _codes(x_a, scale_ptr, zero_point_ptr, K, 0, BLOCK_A, HEAD_DIM)
    store_row_part(q_ptr, q_a, t, T, K, stride_qt, 0, BLOCK_A)
    if BLOCK_B > 0:
        x_b = prepared_row_part(x_ptr, before, t, T, K, stride_xt, BLOCK_A, BLOCK_B)
        q_b = _codes(x_b, scale_ptr, zero_point_ptr, K, BLOCK_A, BLOCK_B, HEAD_DIM)
        store_row_part(q_ptr, q_b, t, T, K, stride_qt, BLOCK_A, BLOCK_B)


def launch(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    gelu: bool = False,
    config: tuning.RowConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `quantize.quantize_static`; `gelu` goes before the shift."""
    num_tokens, in_features = x.shape
    q = torch.empty((num_tokens, in_features), dtype=torch.int8, device=x.device)
    if num_tokens == 0:
        return q
    if config is None:
        tables = tuning.tables_of(x.device)
        config = tuning.row_config("quantize_static", tables, num_tokens, in_features)
    block_a, block_b = row_parts(in_features)
    head_dim = in_features // len(scale) if len(scale) > 1 else 0
    with on_device_of(x):
        run_kernel(
            _quantize_static_kernel, (triton.cdiv(num_tokens, config.rows),),
            x, scale, zero_point, q,
            stages_before(num_tokens, config.rows, gelu, smooth_inv, group_shift, group_index),
            num_tokens, in_features, x.stride(0), q.stride(0),
            ROWS=config.rows, BLOCK_A=block_a, BLOCK_B=block_b, HEAD_DIM=head_dim,
            num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return q
