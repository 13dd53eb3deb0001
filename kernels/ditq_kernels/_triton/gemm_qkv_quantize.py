"""One GEMM for the queries, keys and values of an attention, whose weights stay three tensors: int8 codes of heads.

The grid is that of one wide layer; each program takes its pointers from the third it works in. Queries and keys are
written as [B, T, H, D] memory. Values are written with tokens contiguous, [B, H, D, T], as their int8 product contracts
them: the tile is [tokens, outputs] anyway, so either order is one pass through shared memory.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ditq_kernels._triton import gemm_any
from ditq_kernels._triton.gemm_w4a8 import sums_w4a8
from ditq_kernels._triton.gemm_w4a8_per_group import group_constants, sums_w4a8_per_group
from ditq_kernels._triton.gemm_w8a8 import sums_w8a8
from ditq_kernels._triton.parts.common import (
    GROUP_T,
    INT8_MAX,
    INT8_MIN,
    INTERPRETED,
    on_device_of,
    rounded_steps,
    run_kernel,
    tile_of_program,
)
from ditq_kernels._triton.parts.epilogue import (
    Bias,
    Scales,
    dequantized,
    offsets_in_tile,
    plus_bias,
)
from ditq_kernels._triton.parts.prepared_w4 import prepared_w4
from ditq_kernels._triton.parts.prepared_w4g import prepared_w4g
from ditq_kernels.launch import tuning
from ditq_kernels.reference.fused import new_heads

VALUES = tl.constexpr(2)  # the third that is written transposed


class Heads(NamedTuple):
    """Where codes go, and their static scales."""

    out: Any  # [B, T, H, D], [B, H, D, padded T] int8: q, k, v
    scale: Any  # three of [1] or [H] fp32
    scale_step: Any  # three of 0 or 1: elements from head to head
    zero_point: Any  # of the values: [1] or [H] int32, or None
    zero_step: Any
    head_dim: Any  # constexpr
    tokens: Any  # of an image
    padded_tokens: Any  # of an image of values


@triton.jit
def of_third(third, three):
    """One of three pointers or numbers; a select keeps what the compiler knows of their alignment."""
    return tl.where(third == 0, three[0], tl.where(third == 1, three[1], three[2]))


@triton.jit
def third_of_program(T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_T: tl.constexpr):
    """Token tile, output tile and third of this program; a third starts with a tile of its own."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_t, tile = tile_of_program(T, 3 * tiles_n * BLOCK_N, BLOCK_T, BLOCK_N, GROUP_T)
    return tile_t, tile % tiles_n, tile // tiles_n


@triton.jit
def values_of(total, scales, third, t, n, T, N, T_AXIS: tl.constexpr):
    """fp32 tile of the sums of a third."""
    # a named tuple is made in the call: Triton turns the constants of an assigned one into tensors; and None is said
    # there, because no function of Triton can return it
    return dequantized(
        total,
        Scales(
            scales.scale,
            None if scales.weight_scale is None else of_third(third, scales.weight_scale),
            scales.zero_point,
            None if scales.weight_sum is None else of_third(third, scales.weight_sum),
            scales.per_token_scale, scales.per_token_zero,
        ),
        t, n, T, N, T_AXIS,
    )  # fmt: skip


@triton.jit
def plus_bias_of(y, bias, third, first_t, t, n, T, N, T_AXIS: tl.constexpr):
    """Add the bias of a third."""
    return plus_bias(
        y, Bias(of_third(third, bias.table), bias.index, bias.rows_per_sample, bias.one_sample),
        first_t, t, n, T, N, T_AXIS,
    )  # fmt: skip


@triton.jit
def head_codes(y, heads, third, n, N, T_AXIS: tl.constexpr):
    """Int32 codes with the static scale of each head."""
    head, inside = n // heads.head_dim, n < N
    at = of_third(third, heads.scale) + head * of_third(third, heads.scale_step)
    scale = tl.load(at, mask=inside, other=1.0)
    inv_scale = tl.expand_dims(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), T_AXIS)
    if heads.zero_point is None:
        codes = rounded_steps(y, inv_scale, INT8_MIN * 1.0, INT8_MAX * 1.0)
    else:
        valued = inside & (third == VALUES)
        zero = tl.load(heads.zero_point + head * heads.zero_step, mask=valued, other=0)
        zero = tl.expand_dims(zero, T_AXIS)
        low, high = (-zero + INT8_MIN).to(tl.float32), (-zero + INT8_MAX).to(tl.float32)
        codes = rounded_steps(y, inv_scale, low, high) + zero
    return codes


@triton.jit
def write_heads(total, third, tile_t, tile_n, T, N, epilogue, heads, T_AXIS: tl.constexpr):
    """Quantize a tile of sums, [T, N] (T_AXIS 0) or [N, T] (1), and store it in its third's tensor."""
    N_AXIS: tl.constexpr = 1 - T_AXIS
    first_t, first_n = tile_t * total.shape[T_AXIS], tile_n * total.shape[N_AXIS]
    t = first_t + tl.arange(0, total.shape[T_AXIS])
    n = first_n + tl.arange(0, total.shape[N_AXIS])
    y = values_of(total, epilogue.scales, third, t, n, T, N, T_AXIS)
    if epilogue.bias.table is not None:
        y = plus_bias_of(y, epilogue.bias, third, first_t, t, n, T, N, T_AXIS)
    codes = head_codes(y, heads, third, n, N, T_AXIS).to(tl.int8)
    inside = tl.expand_dims(t < T, N_AXIS) & tl.expand_dims(n < N, T_AXIS)
    if third == VALUES:
        image = (t // heads.tokens).to(tl.int64) * N * heads.padded_tokens  # int64: T * N may pass 2**31
        rows = tl.expand_dims(image + t % heads.tokens, N_AXIS)
        columns = tl.expand_dims(n.to(tl.int64) * heads.padded_tokens, T_AXIS)
        tl.store(heads.out[2] + rows + columns, codes, mask=inside)
    else:
        at = of_third(third, heads.out) + (first_t.to(tl.int64) * N + first_n)
        tl.store(at + offsets_in_tile(N, total.shape, T_AXIS), codes, mask=inside)


@triton.jit
def _gemm_qkv_w8a8_kernel(
    q_ptr, weights, epilogue, heads,  # [T, K] int8, three of [N, K] int8, an Epilogue of threes, a Heads
    T, N, K, stride_qt, stride_wn,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    tile_t, tile_n, third = third_of_program(T, N, BLOCK_T, BLOCK_N, GROUP_T)
    total = sums_w8a8(
        q_ptr, of_third(third, weights), tile_t, tile_n, T, N, K, stride_qt, stride_wn,
        EVEN_K, 1, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    write_heads(total, third, tile_t, tile_n, T, N, epilogue, heads, T_AXIS=0)


@triton.jit
def _gemm_qkv_w4a8_kernel(
    q_ptr, splits, group_scales, group_offsets, epilogue, heads,  # three of [N, K / 2] bytes, [J, N] uint8, int8
    T, N, K, stride_qt, stride_sn,
    EVEN_K: tl.constexpr,  # K is a multiple of UNIT
    GROUP_SIZE: tl.constexpr, UNIT: tl.constexpr, INLINE_ASM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    tile_t, tile_n, third = third_of_program(T, N, BLOCK_T, BLOCK_N, GROUP_T)
    total = sums_w4a8(
        q_ptr, of_third(third, splits), of_third(third, group_scales), of_third(third, group_offsets),
        tile_t, tile_n, T, N, K, stride_qt, stride_sn, EVEN_K, 1, GROUP_SIZE, UNIT, INLINE_ASM, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    write_heads(total, third, tile_t, tile_n, T, N, epilogue, heads, T_AXIS=1)


@triton.jit
def _gemm_qkv_w4a8_per_group_kernel(
    q_ptr, splits, weight_scales, weight_zeros, weight_sums,  # three each, see gemm_w4a8_per_group; sums may be None
    zero_point_ptr, epilogue, heads,
    T, N, K, stride_qt, stride_sn,
    PER_TOKEN_ZERO: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of SPAN
    GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr,
    BY_BITS: tl.constexpr, INLINE_ASM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    tile_t, tile_n, third = third_of_program(T, N, BLOCK_T, BLOCK_N, GROUP_T)
    total = sums_w4a8_per_group(
        q_ptr, of_third(third, splits), of_third(third, weight_scales), of_third(third, weight_zeros),
        None if weight_sums is None else of_third(third, weight_sums), zero_point_ptr,
        tile_t, tile_n, T, N, K, stride_qt, stride_sn,
        PER_TOKEN_ZERO, EVEN_K, GROUP_SIZE, SPAN, BY_BITS, INLINE_ASM, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    write_heads(total, third, tile_t, tile_n, T, N, epilogue, heads, T_AXIS=1)


Three = tuple[torch.Tensor, ...] | list[torch.Tensor]


def launch(
    q: torch.Tensor,
    weights: Three,
    group_scales: Three,
    group_offsets: Three,
    head_scales: Three,
    v_zero_point: torch.Tensor | None,
    batch: int,
    heads: int,
    scale: torch.Tensor,
    weight_scales: Three,
    biases: Three,
    zero_point: torch.Tensor | None,
    weight_sums: Three,
    bias_index: torch.Tensor | None,
    config: tuning.TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments as in `qkv_fused.gemm_qkv_quantize`, three tensors each, or none."""
    (num_tokens, in_features), out_features = q.shape, weights[0].shape[0]
    out = new_heads(q, batch, heads, out_features // heads)
    if out[0].numel() == 0:
        return out
    epilogue, config = gemm_any.launch_stages(
        q, group_scales[0] if group_scales else None, group_offsets[0] if group_offsets else None,
        (scale, tuple(weight_scales), tuple(biases) or None, zero_point, tuple(weight_sums) or None,
         bias_index, None, None),
        config,
    )  # fmt: skip
    stage = Heads(
        out, tuple(head_scales), tuple(int(one.numel() > 1) for one in head_scales),
        v_zero_point, int(v_zero_point is not None and v_zero_point.numel() > 1),
        tl.constexpr(out_features // heads), num_tokens // batch, out[2].stride(3),
    )  # fmt: skip
    programs = 3 * triton.cdiv(num_tokens, config.block_t) * triton.cdiv(out_features, config.block_n)
    with on_device_of(q):
        if not group_offsets:
            kernel, parts, constants = _int8(weights, in_features, config)
        elif group_scales:
            kernel, parts, constants = _progressive(weights, group_scales, group_offsets, in_features)
        else:
            kernel, parts, constants = _real_groups(
                weights, weight_scales, group_offsets, zero_point, weight_sums, in_features, config
            )
        run_kernel(
            kernel, (programs,),
            q, *parts, epilogue, stage,
            num_tokens, out_features, in_features, q.stride(0), parts[0][0].stride(0),
            **constants, BLOCK_T=config.block_t, BLOCK_N=config.block_n, GROUP_T=GROUP_T,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, what it reads of the weights, constants


def _int8(weights: Three, in_features: int, config: tuning.TileConfig) -> Launch:
    constants = {"EVEN_K": in_features % config.block_k == 0, "BLOCK_K": config.block_k}
    return _gemm_qkv_w8a8_kernel, (tuple(weights),), constants


def _progressive(
    weights: Three, group_scales: Three, group_offsets: Three, in_features: int
) -> Launch:
    made = [prepared_w4(*one) for one in zip(weights, group_scales, group_offsets, strict=True)]
    unit, group_size = made[0].unit, in_features // group_scales[0].shape[1]
    constants = {"EVEN_K": in_features % unit == 0, "UNIT": unit, "GROUP_SIZE": group_size}
    parts = tuple(tuple(getattr(one, n) for one in made) for n in ("split", "scale", "offset"))
    return _gemm_qkv_w4a8_kernel, parts, constants | {"INLINE_ASM": not INTERPRETED}


def _real_groups(
    weights: Three,
    weight_scales: Three,
    weight_zeros: Three,
    zero_point: torch.Tensor | None,
    weight_sums: Three,
    in_features: int,
    config: tuning.TileConfig,
) -> Launch:
    sums: Any = weight_sums or (None,) * 3
    made = [prepared_w4g(*one) for one in zip(weights, weight_scales, weight_zeros, sums, strict=True)]
    split, scale, zero = (tuple(getattr(one, n) for one in made) for n in ("split", "scale", "zero"))
    parts = (split, scale, zero, tuple(one.sums for one in made) if weight_sums else None, zero_point)
    span, group_size = made[0].span, in_features // weight_scales[0].shape[1]
    return _gemm_qkv_w4a8_per_group_kernel, parts, {
        "PER_TOKEN_ZERO": zero_point is not None and zero_point.numel() > 1,
        "EVEN_K": in_features % span == 0, "INLINE_ASM": not INTERPRETED,
        **group_constants(group_size, span, config.block_k),
    }  # fmt: skip
