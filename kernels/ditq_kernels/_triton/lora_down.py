"""The first factor of a low-rank branch on int8 activations: bf16 products, summed in fp32.

A code minus its zero point is an integer below 2**8 and so exact in bf16.
"""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import (
    INTERPRETED,
    ROUND_TO_INTEGER,
    on_device_of,
    run_kernel,
)
from ditq_kernels.launch import tuning


@triton.jit
def _lora_down_kernel(
    q_ptr, down_ptr, out_ptr,  # [T, K] int8, [R, K] bf16, [T, R] bf16
    scale_ptr, zero_point_ptr,  # [T] or [1] fp32, [T] or [1] int32 or None
    T, R, K, stride_qt, stride_dr,
    PER_TOKEN_SCALE: tl.constexpr, PER_TOKEN_ZERO: tl.constexpr, BF16_DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_r = tl.cdiv(R, BLOCK_R)
    t = tl.program_id(0) // tiles_r * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(0) % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    # rows past the end read the last row instead of needing a mask; they are never stored
    rows = tl.minimum(t, T - 1)
    q_at = q_ptr + rows.to(tl.int64)[:, None] * stride_qt
    down_at = down_ptr + tl.minimum(r, R - 1).to(tl.int64)[:, None] * stride_dr
    zero_point = tl.full((BLOCK_T,), 0, tl.int32)
    if zero_point_ptr is not None:
        zero_point += tl.load(zero_point_ptr + rows if PER_TOKEN_ZERO else zero_point_ptr)
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        q = tl.load(q_at + k[None, :], mask=(k < K)[None, :], other=0)
        down = tl.load(down_at + k[None, :], mask=(k < K)[None, :], other=0.0)  # zeros past K
        # int to float without the slow conversion unit: an integer in the low bits of 1.5 * 2**23
        centred = q.to(tl.int32) - zero_point[:, None] + 0x4B400000
        centred = centred.to(tl.float32, bitcast=True) - ROUND_TO_INTEGER
        if BF16_DOT:
            total = tl.dot(centred.to(tl.bfloat16), tl.trans(down), total)
        else:  # the interpreter has no bf16 product
            total = tl.dot(centred, tl.trans(down.to(tl.float32)), total)
    scale = tl.load(scale_ptr + rows if PER_TOKEN_SCALE else scale_ptr)
    y = total * tl.broadcast_to(scale, (BLOCK_T,))[:, None]
    at = out_ptr + t.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(at, y.to(tl.bfloat16), mask=(t < T)[:, None] & (r < R)[None, :])


def launch(
    q: torch.Tensor,
    down: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    config: tuning.TileConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `ops.lora_down`."""
    (num_tokens, in_features), rank = q.shape, down.shape[0]
    out = torch.empty((num_tokens, rank), dtype=torch.bfloat16, device=q.device)
    if out.numel() == 0:
        return out
    if config is None:
        tables = tuning.tables_of(q.device)
        config = tuning.tile_config("lora_down", tables, num_tokens, in_features)
    block_r = min(config.block_n, max(16, triton.next_power_of_2(rank)))
    tiles = triton.cdiv(num_tokens, config.block_t) * triton.cdiv(rank, block_r)
    with on_device_of(q):
        run_kernel(
            _lora_down_kernel, (tiles,),
            q, down, out, scale, zero_point,
            num_tokens, rank, in_features, q.stride(0), down.stride(0),
            PER_TOKEN_SCALE=scale.numel() > 1,
            PER_TOKEN_ZERO=zero_point is not None and zero_point.numel() > 1,
            BF16_DOT=not INTERPRETED,
            BLOCK_T=config.block_t, BLOCK_R=block_r, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out
