"""Int8 activations times int4 weights with a real scale per group: int32 in a group, fp32 across groups.

As in `gemm_w4a8` the weights are the first operand and each warp unpacks its own rows, here to
`code - zero`, four bytes at a time: `(code | 128) - zero` never borrows from byte to byte because
zero <= 15, and flipping the top bit subtracts the 128. So the zero points need no row sums of the
activations; a zero point of the activations starts a group's sum at `-zero_point * weight_sum`.

Sums that fit into 22 bits start 1.5 * 2**23 higher, as an integer with that bit pattern: the result,
read as fp32, is the sum plus 1.5 * 2**23 exactly, and needs no conversion, which runs on a slow unit.
"""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.gemm_w4a8 import in_four_bytes
from ditq_kernels._triton.parts.common import (
    GROUP_T,
    INTERPRETED,
    ROUND_TO_INTEGER,
    on_device_of,
    run_kernel,
    tile_of_program,
)
from ditq_kernels._triton.parts.epilogue import Epilogue, gemm_launch, write_tile
from ditq_kernels._triton.parts.prepared_w4g import prepared_w4g
from ditq_kernels.launch import tuning

OP = "gemm_w4a8_per_group"
ROUND_TO_INTEGER_BITS = tl.constexpr(0x4B400000)  # of fp32 1.5 * 2**23
LARGEST_PRODUCT = 255 * 15


@triton.jit
def unpack_steps(packed, zero, HIGH: tl.constexpr, INLINE_ASM: tl.constexpr):
    """int8 `code - zero` of the low or the high nibbles; zero holds the zero point in each byte.

    INLINE_ASM works on four bytes per register; the plain twin is for the interpreter.
    """
    if INLINE_ASM and HIGH:
        steps = tl.inline_asm_elementwise(
            """{ .reg .b32 u;
            shr.u32 u, $1, 4;
            and.b32 u, u, 0x0F0F0F0F;
            or.b32 u, u, 0x80808080;
            sub.u32 u, u, $2;
            xor.b32 $0, u, 0x80808080; }""",
            "=r,r,r,r,r,r",  # $1: 4 bytes; $2..$5: zero, equal in a row
            [packed, zero],
            dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    elif INLINE_ASM:
        steps = tl.inline_asm_elementwise(
            """{ .reg .b32 u;
            and.b32 u, $1, 0x0F0F0F0F;
            or.b32 u, u, 0x80808080;
            sub.u32 u, u, $2;
            xor.b32 $0, u, 0x80808080; }""",
            "=r,r,r,r,r,r",
            [packed, zero],
            dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        codes = packed.to(tl.int32)
        codes = codes >> 4 if HIGH else codes & 15
        steps = (codes - (zero & 255)).to(tl.int8)
    return steps


@triton.jit
def load_zero(zero_at, INLINE_ASM: tl.constexpr):
    """Zero points of a group, int32 [BLOCK_N, 1], in each of the four bytes."""
    return in_four_bytes(tl.load(zero_at).to(tl.int32), INLINE_ASM)[:, None]


@triton.jit
def empty_sum(
    zero_point_at, weight_sum_ptr, group,
    BY_BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """int32 [BLOCK_N, BLOCK_T] to add a group's products of codes to."""
    total = tl.full((BLOCK_N, BLOCK_T), ROUND_TO_INTEGER_BITS if BY_BITS else 0, tl.int32)
    if weight_sum_ptr is not None:
        total -= tl.load(weight_sum_ptr + group)[:, None] * tl.load(zero_point_at)[None, :]
    return total


@triton.jit
def add_half(
    total, packed, zero, q_at, k, k_left,
    HIGH: tl.constexpr, EVEN_K: tl.constexpr, INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """The total plus products of the low or the high codes; inputs from k_left on count as 0."""
    q = tl.load(q_at) if EVEN_K else tl.load(q_at, mask=(k < k_left)[:, None], other=0)
    steps = unpack_steps(packed, tl.broadcast_to(zero, packed.shape), HIGH, INLINE_ASM)
    return tl.dot(steps, q, total, out_dtype=tl.int32)


@triton.jit
def scaled_sum(total, weight_scale, BY_BITS: tl.constexpr):
    """A finished group in units of weight times activation step, fp32."""
    biased = total.to(tl.float32, bitcast=BY_BITS)
    return (biased - ROUND_TO_INTEGER if BY_BITS else biased) * weight_scale


@triton.jit
def sums_w4a8_per_group(
    q_ptr, split_ptr, weight_scale_ptr, weight_zero_ptr, weight_sum_ptr, zero_point_ptr,
    tile_t, tile_n, T, N, K, stride_qt, stride_sn,
    PER_TOKEN_ZERO: tl.constexpr, EVEN_K: tl.constexpr, GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr,
    BY_BITS: tl.constexpr, INLINE_ASM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of weight @ (q - zero_point).T in real weights, fp32 [BLOCK_N, BLOCK_T], groups in ascending order."""
    HALF: tl.constexpr = SPAN // 2
    PAIRED: tl.constexpr = SPAN == 2 * GROUP_SIZE
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows past the end read the last row instead of needing a mask; they are never stored
    real_n, real_t = tl.minimum(n, N - 1), tl.minimum(t, T - 1)
    split_at = split_ptr + (real_n.to(tl.int64) * stride_sn)[:, None] + k[None, :]
    q_at = q_ptr + (real_t.to(tl.int64) * stride_qt)[None, :] + k[:, None]  # int64: T * K
    zero_point_at = None
    if zero_point_ptr is not None:
        zero_point_at = zero_point_ptr + (real_t if PER_TOKEN_ZERO else real_t * 0)
    y = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(0, K, SPAN):
        group = real_n + start // GROUP_SIZE * N
        zero = load_zero(weight_zero_ptr + group, INLINE_ASM)
        weight_scale = tl.load(weight_scale_ptr + group)[:, None]
        total = empty_sum(zero_point_at, weight_sum_ptr, group, BY_BITS, BLOCK_N, BLOCK_T)
        for at in range(0, HALF, BLOCK_K):
            packed = tl.load(split_at + at)
            left = K - start - at
            total = add_half(total, packed, zero, q_at + at, k, left, False, EVEN_K, INLINE_ASM)
            if not PAIRED:
                total = add_half(
                    total, packed, zero, q_at + HALF + at, k, left - HALF, True, EVEN_K, INLINE_ASM
                )
        y += scaled_sum(total, weight_scale, BY_BITS)
        if PAIRED:
            zero = load_zero(weight_zero_ptr + group + N, INLINE_ASM)
            weight_scale = tl.load(weight_scale_ptr + group + N)[:, None]
            total = empty_sum(zero_point_at, weight_sum_ptr, group + N, BY_BITS, BLOCK_N, BLOCK_T)
            for at in range(0, HALF, BLOCK_K):
                packed = tl.load(split_at + at)
                left = K - start - HALF - at
                total = add_half(
                    total, packed, zero, q_at + HALF + at, k, left, True, EVEN_K, INLINE_ASM
                )
            y += scaled_sum(total, weight_scale, BY_BITS)
        split_at += HALF
        q_at += SPAN
    return y


@triton.jit
def _gemm_w4a8_per_group_kernel(
    q_ptr, split_ptr, out_ptr,  # [T, K] int8, [N, padded K / 2] bytes, [T, N] float or int8
    weight_scale_ptr, weight_zero_ptr, weight_sum_ptr,  # [J', N] fp32, uint8, int32 or None
    zero_point_ptr,  # [T] or [1] int32, or None
    epilogue,  # an Epilogue whose scales are those of the activations
    T, N, K, stride_qt, stride_sn, stride_ot,
    PER_TOKEN_ZERO: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of SPAN
    GROUP_SIZE: tl.constexpr, SPAN: tl.constexpr,
    BY_BITS: tl.constexpr, INLINE_ASM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
    PARTS: tl.constexpr,  # of a tile, for the epilogue
):  # fmt: skip
    tile_t, tile_n = tile_of_program(T, N, BLOCK_T, BLOCK_N, GROUP_T)
    y = sums_w4a8_per_group(
        q_ptr, split_ptr, weight_scale_ptr, weight_zero_ptr, weight_sum_ptr, zero_point_ptr,
        tile_t, tile_n, T, N, K, stride_qt, stride_sn,
        PER_TOKEN_ZERO, EVEN_K, GROUP_SIZE, SPAN, BY_BITS, INLINE_ASM, BLOCK_T, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    write_tile(y, tile_t, tile_n, T, N, out_ptr, stride_ot, epilogue, T_AXIS=1, PARTS=PARTS)


def launch(
    q: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
    config: tuning.TileConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `per_group.gemm_w4a8_per_group`."""
    out = torch.empty((q.shape[0], packed.shape[0]), dtype=out_dtype, device=q.device)
    if out.numel() == 0:
        return out
    # every group takes out its part of the zero point, so the epilogue gets none
    epilogue, config = gemm_launch(
        OP, q, scale, None, bias, None, None, bias_index, lora_x, lora_up, config=config
    )
    run(q, packed, weight_scale, weight_zero, zero_point, weight_sum, out, epilogue, config)
    return out


def run(
    q: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out: torch.Tensor,
    epilogue: Epilogue,
    config: tuning.TileConfig,
) -> None:
    """Fill `out` with what the epilogue makes of q - zero_point times the real weights."""
    (num_tokens, in_features), out_features = q.shape, packed.shape[0]
    tiles = triton.cdiv(num_tokens, config.block_t) * triton.cdiv(out_features, config.block_n)
    with on_device_of(q):
        weights = prepared_w4g(packed, weight_scale, weight_zero, weight_sum)
        run_kernel(
            _gemm_w4a8_per_group_kernel, (tiles,),
            q, weights.split, out, weights.scale, weights.zero, weights.sums, zero_point, epilogue,
            num_tokens, out_features, in_features,
            q.stride(0), weights.split.stride(0), out.stride(0),
            PER_TOKEN_ZERO=zero_point is not None and zero_point.numel() > 1,
            EVEN_K=in_features % weights.span == 0,
            **group_constants(in_features // weight_scale.shape[1], weights.span, config.block_k),
            INLINE_ASM=not INTERPRETED,
            BLOCK_T=config.block_t, BLOCK_N=config.block_n, GROUP_T=GROUP_T, PARTS=config.parts,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip


def group_constants(group_size: int, span: int, block_k: int) -> dict[str, int | bool]:
    """Constants of the kernel that follow from the group size; block_k inputs an iteration at most."""
    half = span // 2
    return {
        "GROUP_SIZE": group_size, "SPAN": span,
        "BLOCK_K": min(half & -half, block_k // 2),  # the largest power of two that divides half
        "BY_BITS": group_size * LARGEST_PRODUCT < 2**22,
    }  # fmt: skip
