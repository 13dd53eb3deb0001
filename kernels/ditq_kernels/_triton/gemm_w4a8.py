"""Int8 activations times progressive int4 weights: expanded to int8 in registers, int32 sums over K.

Weights are the first operand (the tile is weight x activations^T), so each warp expands only its own
rows and, on Hopper, the tensor core reads them from registers. Expanding takes 7 operations per 8
weights, four bytes at a time: `code * group_scale + (group_offset + 128)` never carries from byte to
byte because the packer keeps every result in 0..255, and flipping the top bits subtracts the 128.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts import split_k
from ditq_kernels._triton.parts.common import (
    GROUP_T,
    INTERPRETED,
    on_device_of,
    run_kernel,
    tile_of_program,
)
from ditq_kernels._triton.parts.epilogue import Epilogue, gemm_launch, write_tile
from ditq_kernels._triton.parts.prepared_w4 import prepared_w4
from ditq_kernels._triton.parts.split_k import inputs_of_program, write_sums
from ditq_kernels.launch import tuning


@triton.jit
def load_group(group_scale_ptr, group_offset_ptr, group):
    """Of a group of each channel: group_scale, and group_offset + 128, both int32 [BLOCK_N, 1]."""
    scale = tl.load(group_scale_ptr + group.to(tl.uint32)).to(tl.int32)
    offset = tl.load(group_offset_ptr + group.to(tl.uint32)).to(tl.int32) + 128
    return scale[:, None], offset[:, None]


@triton.jit
def in_four_bytes(value, INLINE_ASM: tl.constexpr):
    """The lowest byte of a word in each of its bytes."""
    if INLINE_ASM:  # one byte permutation instead of a product
        four = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0;", "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        four = value * 0x01010101
    return four


@triton.jit
def expand_nibbles(
    packed, low_scale, low_offset, high_scale, high_offset,
    BLOCK_N: tl.constexpr, HALF: tl.constexpr, INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """Both int8 halves of packed bytes, and their groups as `load_group` gives them.

    INLINE_ASM works on four bytes per register. The plain twin is for the interpreter, which has no
    assembly; compiled, it would cost ten times the instructions.
    """
    low_scale = tl.broadcast_to(low_scale, (BLOCK_N, HALF))
    high_scale = tl.broadcast_to(high_scale, (BLOCK_N, HALF))
    low_offset = tl.broadcast_to(in_four_bytes(low_offset, INLINE_ASM), (BLOCK_N, HALF))
    high_offset = tl.broadcast_to(in_four_bytes(high_offset, INLINE_ASM), (BLOCK_N, HALF))
    if INLINE_ASM:
        low = tl.inline_asm_elementwise(
            """{ .reg .b32 u;
            and.b32 u, $1, 0x0F0F0F0F;
            mad.lo.u32 u, u, $2, $6;
            xor.b32 $0, u, 0x80808080; }""",
            "=r,r,r,r,r,r,r,r,r,r",  # $1: 4 bytes; $2..$5: scale, $6..$9: offset, equal in a row
            [packed, low_scale, low_offset],
            dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
        high = tl.inline_asm_elementwise(
            """{ .reg .b32 u;
            shr.u32 u, $1, 4;
            and.b32 u, u, 0x0F0F0F0F;
            mad.lo.u32 u, u, $2, $6;
            xor.b32 $0, u, 0x80808080; }""",
            "=r,r,r,r,r,r,r,r,r,r",
            [packed, high_scale, high_offset],
            dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        codes = packed.to(tl.int32)
        low = ((codes & 15) * low_scale + (low_offset & 255) - 128).to(tl.int8)
        high = ((codes >> 4) * high_scale + (high_offset & 255) - 128).to(tl.int8)
    return low, high


@triton.jit
def sums_w4a8(
    q_ptr, split_ptr, group_scale_ptr, group_offset_ptr, tile_t, tile_n, T, N, K, stride_qt, stride_sn,
    EVEN_K: tl.constexpr, SPLITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, UNIT: tl.constexpr, INLINE_ASM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of weight @ q.T, int32 [BLOCK_N, BLOCK_T], or this program's part of the sums."""
    HALF: tl.constexpr = UNIT // 2
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, HALF)
    # rows past the end read the last row instead of needing a mask; they are never stored
    real_n = tl.minimum(n, N - 1)
    rows = real_n.to(tl.int64) * stride_sn  # int64: N * K may pass 2**31
    columns = tl.minimum(t, T - 1).to(tl.int64) * stride_qt
    split_at = split_ptr + rows[:, None] + k[None, :]
    q_at = q_ptr + columns[None, :] + k[:, None]
    group = real_n  # int32, one register for two addresses: groups are a 32nd of inputs times outputs
    # groups of a unit or of half a unit: each unit has those that follow the last one's
    WALKS: tl.constexpr = EVEN_K and UNIT % GROUP_SIZE == 0
    last_group = K // GROUP_SIZE - 1  # padding of the last unit multiplies zero activations
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.int32)
    first, end = 0, K
    if SPLITS > 1:
        first, end = inputs_of_program(K, UNIT, SPLITS)
        split_at += first // 2
        q_at += first
        if WALKS:
            group += first // GROUP_SIZE * N
    for start in range(first, end, UNIT):
        packed = tl.load(split_at)  # padded to whole units: no mask
        if EVEN_K:
            q_low = tl.load(q_at)
            q_high = tl.load(q_at + HALF)
        else:
            q_low = tl.load(q_at, mask=(start + k < K)[:, None], other=0)
            q_high = tl.load(q_at + HALF, mask=(start + HALF + k < K)[:, None], other=0)
        if WALKS:
            low_scale, low_offset = load_group(group_scale_ptr, group_offset_ptr, group)
            high_scale, high_offset = low_scale, low_offset
            if GROUP_SIZE == HALF:
                high_scale, high_offset = load_group(group_scale_ptr, group_offset_ptr, group + N)
            group += UNIT // GROUP_SIZE * N
        else:
            low_at = group + tl.minimum(start // GROUP_SIZE, last_group) * N
            low_scale, low_offset = load_group(group_scale_ptr, group_offset_ptr, low_at)
            high_scale, high_offset = low_scale, low_offset
            if GROUP_SIZE % UNIT != 0:
                high_at = group + tl.minimum((start + HALF) // GROUP_SIZE, last_group) * N
                high_scale, high_offset = load_group(group_scale_ptr, group_offset_ptr, high_at)
        low, high = expand_nibbles(
            packed, low_scale, low_offset, high_scale, high_offset, BLOCK_N, HALF, INLINE_ASM
        )
        total = tl.dot(low, q_low, total, out_dtype=tl.int32)
        total = tl.dot(high, q_high, total, out_dtype=tl.int32)
        split_at += HALF
        q_at += UNIT
    return total


@triton.jit
def _gemm_w4a8_kernel(
    q_ptr, split_ptr, out_ptr,  # [T, K] int8, [N, K / 2] bytes, [T, N]
    group_scale_ptr, group_offset_ptr,  # [J, N] uint8 and int8
    epilogue,  # an Epilogue, or None: sums are stored as they are
    T, N, K, stride_qt, stride_sn, stride_ot,
    EVEN_K: tl.constexpr,  # K is a multiple of UNIT
    SPLITS: tl.constexpr,  # programs that share a tile, see split_k
    GROUP_SIZE: tl.constexpr, UNIT: tl.constexpr, INLINE_ASM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_T: tl.constexpr,
    PARTS: tl.constexpr,  # of a tile, for the epilogue
):  # fmt: skip
    tile_t, tile_n = tile_of_program(T, N, BLOCK_T, BLOCK_N, GROUP_T)
    total = sums_w4a8(
        q_ptr, split_ptr, group_scale_ptr, group_offset_ptr, tile_t, tile_n, T, N, K, stride_qt, stride_sn,
        EVEN_K, SPLITS, GROUP_SIZE, UNIT, INLINE_ASM, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    if SPLITS > 1:
        write_sums(total, tile_t, tile_n, T, N, out_ptr, T_AXIS=1)
    else:
        write_tile(total, tile_t, tile_n, T, N, out_ptr, stride_ot, epilogue, T_AXIS=1, PARTS=PARTS)


def launch(
    q: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
    config: tuning.TileConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `ops.gemm_w4a8`."""
    out = torch.empty((q.shape[0], packed.shape[0]), dtype=out_dtype, device=q.device)
    if out.numel() == 0:
        return out
    epilogue, config = gemm_launch(
        "gemm_w4a8", q, scale, weight_scale, bias, zero_point, weight_sum, bias_index, lora_x, lora_up,
        config=config,
    )  # fmt: skip
    run(q, packed, group_scale, group_offset, out, epilogue, config)
    return out


def run(
    q: torch.Tensor,
    packed: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    out: torch.Tensor,
    epilogue: Epilogue,
    config: tuning.TileConfig,
) -> None:
    """Fill `out` with what the epilogue makes of q times the expanded weights."""
    (num_tokens, in_features), out_features = q.shape, packed.shape[0]
    tiles = triton.cdiv(num_tokens, config.block_t) * triton.cdiv(out_features, config.block_n)
    splits = split_k.splits_of(config, q.device, num_tokens, in_features, out_features)
    with on_device_of(q):
        weights = prepared_w4(packed, group_scale, group_offset)

        def launch_grid(grid: tuple[int, int], to: torch.Tensor, stages: Any, splits: int) -> None:
            run_kernel(
                _gemm_w4a8_kernel, grid,
                q, weights.split, to, weights.scale, weights.offset, stages,
                num_tokens, out_features, in_features,
                q.stride(0), weights.split.stride(0), to.stride(0),
                EVEN_K=in_features % weights.unit == 0, SPLITS=splits,
                GROUP_SIZE=in_features // group_scale.shape[1], UNIT=weights.unit,
                INLINE_ASM=not INTERPRETED,
                BLOCK_T=config.block_t, BLOCK_N=config.block_n, GROUP_T=GROUP_T, PARTS=config.parts,
                num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
            )  # fmt: skip

        split_k.run(splits, tiles, out, epilogue, launch_grid)
