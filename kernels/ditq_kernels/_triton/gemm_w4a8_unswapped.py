"""W4A8 with the activations first, which no op runs: a GPU is asked whether weights first pays (`ditq_bench.gpu_run`).

With the weights as the second operand more warps expand the same rows, and Hopper takes them from shared memory.
"""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.gemm_w4a8 import expand_nibbles, load_group
from ditq_kernels._triton.parts.common import (
    GROUP_T,
    INTERPRETED,
    on_device_of,
    run_kernel,
    tile_of_program,
)
from ditq_kernels._triton.parts.epilogue import gemm_launch, write_tile
from ditq_kernels._triton.parts.prepared_w4 import prepared_w4
from ditq_kernels.launch import tuning


@triton.jit
def _gemm_w4a8_unswapped_kernel(
    q_ptr, split_ptr, out_ptr,  # [T, K] int8, [N, K / 2] bytes, [T, N]
    group_scale_ptr, group_offset_ptr,  # [J, N] uint8 and int8
    epilogue,  # an Epilogue
    T, N, K, stride_qt, stride_sn, stride_ot,
    GROUP_SIZE: tl.constexpr, UNIT: tl.constexpr, INLINE_ASM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = UNIT // 2
    tile_t, tile_n = tile_of_program(T, N, BLOCK_T, BLOCK_N, GROUP_T)
    # rows past the end read the last row instead of needing a mask; they are never stored
    t = tl.minimum(tile_t * BLOCK_T + tl.arange(0, BLOCK_T), T - 1).to(tl.int64)
    n = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    k = tl.arange(0, HALF)
    split_at = split_ptr + (n.to(tl.int64) * stride_sn)[:, None] + k[None, :]
    q_at = q_ptr + (t * stride_qt)[:, None] + k[None, :]
    last_group = K // GROUP_SIZE - 1
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
    for start in range(0, K, UNIT):  # UNIT divides K
        low_at = tl.minimum(start // GROUP_SIZE, last_group) * N + n
        high_at = tl.minimum((start + HALF) // GROUP_SIZE, last_group) * N + n
        low_scale, low_offset = load_group(group_scale_ptr, group_offset_ptr, low_at)
        high_scale, high_offset = load_group(group_scale_ptr, group_offset_ptr, high_at)
        packed = tl.load(split_at)
        low, high = expand_nibbles(
            packed, low_scale, low_offset, high_scale, high_offset, BLOCK_N, HALF, INLINE_ASM
        )
        total = tl.dot(tl.load(q_at), tl.trans(low), total, out_dtype=tl.int32)
        total = tl.dot(tl.load(q_at + HALF), tl.trans(high), total, out_dtype=tl.int32)
        split_at += HALF
        q_at += UNIT
    write_tile(total, tile_t, tile_n, T, N, out_ptr, stride_ot, epilogue, T_AXIS=0)


def launch(
    q: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: tuning.TileConfig | None = None,
) -> torch.Tensor:
    """As `gemm_w4a8.launch`, for inputs that are a multiple of the packing unit.

    Raises:
        ValueError: they are not.
    """
    (num_tokens, in_features), out_features = q.shape, packed.shape[0]
    out = torch.empty((num_tokens, out_features), dtype=out_dtype, device=q.device)
    stages = (scale, weight_scale, bias, None, None, None, None, None)
    epilogue, config = gemm_launch("gemm_w4a8", q, *stages, config=config)
    tiles = triton.cdiv(num_tokens, config.block_t) * triton.cdiv(out_features, config.block_n)
    with on_device_of(q):
        weights = prepared_w4(packed, group_scale, group_offset)
        if in_features % weights.unit:
            raise ValueError(
                f"gemm_w4a8_unswapped: K must be a multiple of {weights.unit}, got {in_features}; use gemm_w4a8"
            )
        run_kernel(
            _gemm_w4a8_unswapped_kernel, (tiles,),
            q, weights.split, out, weights.scale, weights.offset, epilogue,
            num_tokens, out_features, in_features,
            q.stride(0), weights.split.stride(0), out.stride(0),
            GROUP_SIZE=in_features // group_scale.shape[1], UNIT=weights.unit,
            INLINE_ASM=not INTERPRETED,
            BLOCK_T=config.block_t, BLOCK_N=config.block_n, GROUP_T=GROUP_T,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out
