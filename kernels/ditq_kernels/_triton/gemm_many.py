"""Several GEMMs of one quantized input in one launch, whose weights stay where they are.

The grid is that of one wide layer; each program takes its pointers from the layer, here a segment, that its tile lies
in. A segment starts with a tile of its own, and has as many outputs as it likes.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ditq_kernels._triton import gemm_w4a8_per_group
from ditq_kernels._triton.gemm_w4a8 import sums_w4a8
from ditq_kernels._triton.gemm_w4a8_per_group import group_constants, sums_w4a8_per_group
from ditq_kernels._triton.gemm_w8a8 import sums_w8a8
from ditq_kernels._triton.parts.common import (
    GROUP_T,
    INTERPRETED,
    on_device_of,
    run_kernel,
    tile_of_program,
)
from ditq_kernels._triton.parts.epilogue import Bias, Epilogue, Scales, gemm_launch, write_tile
from ditq_kernels._triton.parts.prepared_w4 import prepared_w4
from ditq_kernels._triton.parts.prepared_w4g import prepared_w4g
from ditq_kernels.launch import tuning


@triton.jit
def of_segment(segment, parts):
    """One of several pointers or numbers; a select keeps what the compiler knows of their alignment."""
    found = parts[0]
    for i in tl.static_range(1, len(parts)):
        found = tl.where(segment == i, parts[i], found)
    return found


@triton.jit
def segment_of_program(
    T, widths, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_T: tl.constexpr
):
    """Token tile, segment, and output tile inside of it, of this program; widths are the outputs of the segments."""
    tiles_n = 0
    for i in tl.static_range(len(widths)):
        tiles_n += tl.cdiv(widths[i], BLOCK_N)
    tile_t, tile = tile_of_program(T, tiles_n * BLOCK_N, BLOCK_T, BLOCK_N, GROUP_T)
    segment, first, end = 0, 0, 0
    for i in tl.static_range(len(widths) - 1):
        end += tl.cdiv(widths[i], BLOCK_N)
        behind = tile >= end
        segment += behind.to(tl.int32)
        first = tl.where(behind, end, first)
    return tile_t, segment, tile - first


@triton.jit
def write_segment(
    total, segment, tile_t, tile_n, T, N, outs, epilogue, T_AXIS: tl.constexpr
):
    """Store a tile of sums in its segment's tensor."""
    # named tuples are made in the call: Triton turns the constants of assigned ones into tensors; and None is said
    # there, because no function of Triton can return it
    write_tile(
        total, tile_t, tile_n, T, N, of_segment(segment, outs), N,
        Epilogue(
            Scales(
                epilogue.scales.scale,
                None if epilogue.scales.weight_scale is None else of_segment(segment, epilogue.scales.weight_scale),
                epilogue.scales.zero_point,
                None if epilogue.scales.weight_sum is None else of_segment(segment, epilogue.scales.weight_sum),
                epilogue.scales.per_token_scale, epilogue.scales.per_token_zero,
            ),
            epilogue.low_rank,
            Bias(
                None if epilogue.bias.table is None else of_segment(segment, epilogue.bias.table),
                epilogue.bias.index, epilogue.bias.rows_per_sample, epilogue.bias.one_sample,
            ),
            epilogue.residual, epilogue.gelu,
        ),
        T_AXIS,
    )  # fmt: skip


@triton.jit
def _gemm_many_w8a8_kernel(
    q_ptr, weights, outs, widths, epilogue,  # [T, K] int8; [N, K] int8, [T, N], N of each; an Epilogue of each
    T, K, stride_qt, stride_wn,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    tile_t, segment, tile_n = segment_of_program(T, widths, BLOCK_T, BLOCK_N, GROUP_T)
    N = of_segment(segment, widths)
    total = sums_w8a8(
        q_ptr, of_segment(segment, weights), tile_t, tile_n, T, N, K, stride_qt, stride_wn,
        EVEN_K, 1, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    write_segment(total, segment, tile_t, tile_n, T, N, outs, epilogue, T_AXIS=0)


@triton.jit
def _gemm_many_w4a8_kernel(
    q_ptr, splits, group_scales, group_offsets,  # of each segment [N, K / 2] bytes, [J, N] uint8 and int8
    outs, widths, epilogue,
    T, K, stride_qt, stride_sn,
    EVEN_K: tl.constexpr,  # K is a multiple of UNIT
    GROUP_SIZE: tl.constexpr, UNIT: tl.constexpr, INLINE_ASM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    tile_t, segment, tile_n = segment_of_program(T, widths, BLOCK_T, BLOCK_N, GROUP_T)
    N = of_segment(segment, widths)
    total = sums_w4a8(
        q_ptr, of_segment(segment, splits), of_segment(segment, group_scales), of_segment(segment, group_offsets),
        tile_t, tile_n, T, N, K, stride_qt, stride_sn, EVEN_K, 1, GROUP_SIZE, UNIT, INLINE_ASM, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    write_segment(total, segment, tile_t, tile_n, T, N, outs, epilogue, T_AXIS=1)


@triton.jit
def _gemm_many_w4a8_per_group_kernel(
    q_ptr, splits, weight_scales, weight_zeros, weight_sums,  # of each, see gemm_w4a8_per_group; sums may be None
    zero_point_ptr, outs, widths, epilogue,
    T, K, stride_qt, stride_sn,
    PER_TOKEN_ZERO: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of SPAN
    GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr,
    BY_BITS: tl.constexpr, INLINE_ASM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    tile_t, segment, tile_n = segment_of_program(T, widths, BLOCK_T, BLOCK_N, GROUP_T)
    N = of_segment(segment, widths)
    total = sums_w4a8_per_group(
        q_ptr, of_segment(segment, splits), of_segment(segment, weight_scales), of_segment(segment, weight_zeros),
        None if weight_sums is None else of_segment(segment, weight_sums), zero_point_ptr,
        tile_t, tile_n, T, N, K, stride_qt, stride_sn,
        PER_TOKEN_ZERO, EVEN_K, GROUP_SIZE, SPAN, BY_BITS, INLINE_ASM, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    write_segment(total, segment, tile_t, tile_n, T, N, outs, epilogue, T_AXIS=1)


Each = list[torch.Tensor] | tuple[torch.Tensor, ...]  # one of each segment, or none


def launch(
    q: torch.Tensor,
    weights: Each,
    group_scales: Each,
    group_offsets: Each,
    scale: torch.Tensor,
    weight_scales: Each,
    biases: Each,
    zero_point: torch.Tensor | None,
    weight_sums: Each,
    bias_index: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: tuning.TileConfig | None = None,
) -> list[torch.Tensor]:
    """Run the kernel; arguments as in `many.gemm_many`, lists of one tensor a layer, or of none."""
    (num_tokens, in_features), widths = q.shape, tuple(len(weight) for weight in weights)
    outs = [torch.empty((num_tokens, n), dtype=out_dtype, device=q.device) for n in widths]
    if num_tokens == 0:
        return outs
    op = "gemm_w8a8"
    if group_offsets:
        op = "gemm_w4a8" if group_scales else gemm_w4a8_per_group.OP
    steps: tuple[Any, ...] = (tuple(weight_scales), zero_point, tuple(weight_sums) or None)
    if op == gemm_w4a8_per_group.OP:  # weight scales and zero points are in the sums
        steps = (None, None, None)
    stages: tuple[Any, ...] = (scale, steps[0], tuple(biases) or None, *steps[1:], bias_index, None, None)
    epilogue, config = gemm_launch(op, q, *stages, config=config)
    tiles = triton.cdiv(num_tokens, config.block_t) * sum(triton.cdiv(n, config.block_n) for n in widths)
    with on_device_of(q):
        if op == "gemm_w8a8":
            kernel, parts, constants = _int8(weights, in_features, config)
        elif op == "gemm_w4a8":
            kernel, parts, constants = _progressive(weights, group_scales, group_offsets, in_features)
        else:
            kernel, parts, constants = _real_groups(
                weights, weight_scales, group_offsets, zero_point, weight_sums, in_features, config
            )
        run_kernel(
            kernel, (tiles,),
            q, *parts, tuple(outs), widths, epilogue,
            num_tokens, in_features, q.stride(0), parts[0][0].shape[1],
            **constants, BLOCK_T=config.block_t, BLOCK_N=config.block_n, GROUP_T=GROUP_T,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    return outs


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, what it reads of the weights, constants


def _int8(weights: Each, in_features: int, config: tuning.TileConfig) -> Launch:
    constants = {"EVEN_K": in_features % config.block_k == 0, "BLOCK_K": config.block_k}
    return _gemm_many_w8a8_kernel, (tuple(weights),), constants


def _progressive(weights: Each, group_scales: Each, group_offsets: Each, in_features: int) -> Launch:
    made = [prepared_w4(*one) for one in zip(weights, group_scales, group_offsets, strict=True)]
    unit, group_size = made[0].unit, in_features // group_scales[0].shape[1]
    constants = {"EVEN_K": in_features % unit == 0, "UNIT": unit, "GROUP_SIZE": group_size}
    parts = tuple(tuple(getattr(one, n) for one in made) for n in ("split", "scale", "offset"))
    return _gemm_many_w4a8_kernel, parts, constants | {"INLINE_ASM": not INTERPRETED}


def _real_groups(
    weights: Each,
    weight_scales: Each,
    weight_zeros: Each,
    zero_point: torch.Tensor | None,
    weight_sums: Each,
    in_features: int,
    config: tuning.TileConfig,
) -> Launch:
    sums: Any = weight_sums or (None,) * len(weights)
    made = [prepared_w4g(*one) for one in zip(weights, weight_scales, weight_zeros, sums, strict=True)]
    split, scale, zero = (tuple(getattr(one, n) for one in made) for n in ("split", "scale", "zero"))
    parts = (split, scale, zero, tuple(one.sums for one in made) if weight_sums else None, zero_point)
    span, group_size = made[0].span, in_features // weight_scales[0].shape[1]
    return _gemm_many_w4a8_per_group_kernel, parts, {
        "PER_TOKEN_ZERO": zero_point is not None and zero_point.numel() > 1,
        "EVEN_K": in_features % span == 0, "INLINE_ASM": not INTERPRETED,
        **group_constants(group_size, span, config.block_k),
    }  # fmt: skip
