"""Attention on int8 tensor cores throughout: scores and values.

Probabilities are codes 0 to 255 of exp2(logit - maximum), stored as `code - 128` because tensor
cores here multiply signed by signed. Keys are looked at once, with a running maximum as in INT-FlashAttention
(arXiv:2409.16997), which has 127 levels: the sum of a tile is exact, and fp32 sums of tiles are rescaled when the
maximum grows. The strict form finds the maximum of the whole row first and sums in int32; where keys share a scale its
first look compares integers, costs no more, and is what runs.
"""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts import softmax_tiles as attention
from ditq_kernels._triton.parts import transpose_v
from ditq_kernels._triton.parts.common import (
    INTERPRETED,
    ROUND_TO_INTEGER,
    on_device_of,
    run_kernel,
)
from ditq_kernels._triton.parts.softmax_tiles import (
    LOWEST_LOGIT,
    PER_TOKEN,
    load_queries,
    logits_of,
    row_maximum,
    scale_of_head,
    scores,
    store_part,
    tile_of_head,
)
from ditq_kernels.checks.attention import MAX_STRICT_KEYS, has_tokens_inside
from ditq_kernels.launch import tuning

ROUND_TO_STORED = tl.constexpr(ROUND_TO_INTEGER.value - 128)  # even, so that ties stay ties to even
MAX_ONE_LOOK = 128  # keys a tile, see `rescaled`
CODE_BITS = tl.constexpr(0x4B400000 - 128)


@triton.jit
def stored_codes(logits, top):
    """CODE_BITS + 255 * exp2(logits - top), ties to even, int32: the low byte is the code - 128.

    The fused step rounds only once, and to an integer: fp32 has no fraction at this size.
    """
    p = tl.exp2(logits - top[:, None])
    return tl.fma(p, 255.0, ROUND_TO_STORED).to(tl.int32, bitcast=True)


@triton.jit
def load_values(
    v_ptr, start, stride_vd, keys_to_read,
    EVEN_V: tl.constexpr, D: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int8 [BLOCK_K, BLOCK], from [D, T'] memory; columns past D repeat the last one and are never stored."""
    d = tl.minimum(START + tl.arange(0, BLOCK), D - 1)
    keys = start + tl.arange(0, BLOCK_K)
    at = v_ptr + d[None, :] * stride_vd + keys[:, None]
    return tl.load(at) if EVEN_V else tl.load(at, mask=(keys < keys_to_read)[:, None], other=0)


@triton.jit
def add_values(
    total, v_ptr, start, stride_vd, keys_to_read,
    EVEN_V: tl.constexpr, D: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """Add the same columns to total, int32 [BLOCK, BLOCK_K / 4]: four codes of a word at a time."""
    d = tl.minimum(START + tl.arange(0, BLOCK), D - 1)
    words = start // 4 + tl.arange(0, BLOCK_K // 4)
    at = v_ptr.to(tl.pointer_type(tl.int32)) + d[:, None] * (stride_vd // 4) + words[None, :]
    v = tl.load(at) if EVEN_V else tl.load(at, mask=(4 * words < keys_to_read)[None, :], other=0)
    if INLINE_ASM:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, 0x01010101, $2;", "=r,r,r", [v, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        total += ((v << 24) >> 24) + ((v << 16) >> 24) + ((v << 8) >> 24) + (v >> 24)
    return total


@triton.jit
def column_sums(v_sum, v_sum_ptr, START: tl.constexpr, BLOCK: tl.constexpr):
    """int32 [BLOCK]: what was added here, or what the copy of V counted."""
    return tl.sum(v_sum, 1) if v_sum_ptr is None else tl.load(v_sum_ptr + START + tl.arange(0, BLOCK))


@triton.jit
def rescaled(acc, kept, stored, v, v_sum):
    """One more tile, acc * kept + code @ v, fp32 [BLOCK_Q, BLOCK], rounded once; v_sum [BLOCK] are column sums of v.

    The product is exact: at most 255 * 128 times MAX_ONE_LOOK keys, below 2**22, on top of 1.5 * 2**23 as an integer
    makes the bits of that sum as a float.
    """
    start = tl.broadcast_to((128 * v_sum + 0x4B400000)[None, :], acc.shape)
    product = tl.dot(stored, v, start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    return tl.fma(acc, tl.broadcast_to(kept[:, None], acc.shape), product - ROUND_TO_INTEGER)


@triton.jit
def add_part(
    acc, v_sum, kept, stored, v_ptr, v_sum_ptr, start, stride_vd, keys_to_read,
    ONE_LOOK: tl.constexpr, EVEN_V: tl.constexpr, D: tl.constexpr,
    START: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, INLINE_ASM: tl.constexpr,
):  # fmt: skip
    """Add the codes of a tile times values START and on to acc, and the values to v_sum where nobody summed them."""
    v = load_values(v_ptr, start, stride_vd, keys_to_read, EVEN_V, D, START, BLOCK, BLOCK_K)
    if v_sum_ptr is None:
        if ONE_LOOK:  # acc holds code sums: this tile's is all it needs
            v_sum = tl.zeros_like(v_sum)
        v_sum = add_values(
            v_sum, v_ptr, start, stride_vd, keys_to_read, EVEN_V, D, START, BLOCK, BLOCK_K, INLINE_ASM
        )
    if ONE_LOOK:
        sums = column_sums(v_sum, v_sum_ptr, START, BLOCK)
        acc = rescaled(acc, kept, stored, v, sums)
    else:
        acc = tl.dot(stored, v, acc, out_dtype=tl.int32)
    return acc, v_sum


@triton.jit
def write_part(
    acc, v_sum, v_sum_ptr, code_sum, step, zero_point, b, h, t, Tq, H,
    out_ptr, out_scale_ptr, out_zero_point_ptr, out_smooth_inv_ptr,
    ONE_LOOK: tl.constexpr, D: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Undo the stored offset and the zero point (exactly, where sums are integers); scale; store."""
    total = acc
    if not ONE_LOOK:
        total += 128 * column_sums(v_sum, v_sum_ptr, START, BLOCK)[None, :]
    total -= zero_point * code_sum[:, None]
    store_part(
        total.to(tl.float32) * step[:, None], b, h, t, Tq, H,
        out_ptr, out_scale_ptr, out_zero_point_ptr, out_smooth_inv_ptr, D, START, BLOCK,
    )  # fmt: skip


@triton.jit
def _attention_qk_int8_pv_int8_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,  # [B, H, T, D] int8 twice; [B, H, D, T'] int8; [B, Tq, H, D] float or int8
    out_scale_ptr, out_zero_point_ptr, out_smooth_inv_ptr,  # fp32 [1], int32 [1], fp32 [H * D], or None
    q_scale_ptr, k_scale_ptr, v_scale_ptr,  # fp32: [1], [H] or [B, H, T]; v: [B, H]
    zero_point_ptr,  # int32 [1] or [H] or None
    v_sum_ptr,  # int32 [B, H, VALUE_A + VALUE_B], or [B, H, tiles, the same] for one look; None: summed here
    key_mask_ptr,  # uint8 [B, Tk] or None
    softmax_step, Tq, Tk, keys_to_read, H, stride_qb, stride_kb, stride_vb, stride_vh, stride_vd,
    STRIDE_QH: tl.constexpr, STRIDE_QT: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_KT: tl.constexpr,
    Q_SCALE: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, ZERO_POINT: tl.constexpr,
    D: tl.constexpr, SCORE_A: tl.constexpr, SCORE_B: tl.constexpr,
    VALUE_A: tl.constexpr, VALUE_B: tl.constexpr,
    EVEN_K: tl.constexpr, ONE_TILE: tl.constexpr,  # Tk is a multiple of, at most BLOCK_K
    EVEN_V: tl.constexpr, INLINE_ASM: tl.constexpr,  # T' holds whole tiles; not interpreted
    STRICT: tl.constexpr,  # the maximum of the row comes first
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    ONE_LOOK: tl.constexpr = not (STRICT or ONE_TILE)
    SUM: tl.constexpr = tl.float32 if ONE_LOOK else tl.int32
    b, h, t = tile_of_head(Tq, H, BLOCK_Q)
    rows = tl.minimum(t, Tq - 1)  # rows past the end repeat the last one; they are never stored
    q_ptr += b * stride_qb + h * STRIDE_QH
    q_a, q_b = load_queries(q_ptr, rows.to(tl.int64), STRIDE_QT, D, SCORE_A, SCORE_B)
    k_ptr += b * stride_kb + h * STRIDE_KH
    v_ptr += b * stride_vb + h * stride_vh
    k_scale_ptr = scale_of_head(k_scale_ptr, b, h, H, Tk, K_SCALE)
    if key_mask_ptr is not None:
        key_mask_ptr += b * Tk
    if v_sum_ptr is not None:
        v_sum_ptr += (b * H + h) * (tl.cdiv(Tk, BLOCK_K) if ONE_LOOK else 1) * (VALUE_A + VALUE_B)
    q_scale_at = scale_of_head(q_scale_ptr, b, h, H, Tq, Q_SCALE)
    if Q_SCALE == PER_TOKEN:
        q_scale_at += rows
    row_step = tl.broadcast_to(tl.load(q_scale_at) * softmax_step, (BLOCK_Q,))
    top = tl.full((BLOCK_Q,), LOWEST_LOGIT, tl.float32)
    if STRICT and not ONE_TILE:
        top = row_maximum(
            q_a, q_b, row_step, k_ptr, k_scale_ptr, key_mask_ptr, Tk,
            STRIDE_KT, D, SCORE_A, SCORE_B, K_SCALE, EVEN_K, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    code_sum = tl.zeros((BLOCK_Q,), SUM)
    EXTRA: tl.constexpr = (BLOCK_K * CODE_BITS + 2**31) % 2**32 - 2**31  # int32 wraps; differences fit
    acc_a = tl.zeros((BLOCK_Q, VALUE_A), SUM)
    v_sum_a = tl.zeros((VALUE_A, BLOCK_K // 4), tl.int32)
    if VALUE_B > 0:
        acc_b = tl.zeros((BLOCK_Q, VALUE_B), SUM)
        v_sum_b = tl.zeros((VALUE_B, BLOCK_K // 4), tl.int32)
    for start in range(0, BLOCK_K if ONE_TILE else Tk, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        total = scores(
            q_a, q_b, k_ptr, start, Tk, STRIDE_KT, D, SCORE_A, SCORE_B, EVEN_K, BLOCK_K
        )
        logits = logits_of(total, row_step, k_scale_ptr, key_mask_ptr, keys, Tk, K_SCALE, EVEN_K)
        kept = top
        if ONE_TILE or not STRICT:
            higher = tl.maximum(top, tl.max(logits, 1))
            kept = tl.exp2(top - higher)  # 0 where nothing was attended before
            top = higher
        codes = stored_codes(logits, top)
        new_codes = tl.sum(codes, 1) - EXTRA
        if ONE_LOOK:
            code_sum = tl.fma(code_sum, kept, new_codes.to(tl.float32))
        else:
            code_sum += new_codes
        stored = codes.to(tl.int8)
        acc_a, v_sum_a = add_part(
            acc_a, v_sum_a, kept, stored, v_ptr, v_sum_ptr, start, stride_vd, keys_to_read,
            ONE_LOOK, EVEN_V, D, 0, VALUE_A, BLOCK_K, INLINE_ASM,
        )  # fmt: skip
        if VALUE_B > 0:
            acc_b, v_sum_b = add_part(
                acc_b, v_sum_b, kept, stored, v_ptr, v_sum_ptr, start, stride_vd, keys_to_read,
                ONE_LOOK, EVEN_V, D, VALUE_A, VALUE_B, BLOCK_K, INLINE_ASM,
            )  # fmt: skip
        if ONE_LOOK and v_sum_ptr is not None:
            v_sum_ptr += VALUE_A + VALUE_B
    v_scale = tl.load(scale_of_head(v_scale_ptr, b, h, H, Tk, V_SCALE))
    zero_point = 0
    if zero_point_ptr is not None:
        zero_point = tl.load(scale_of_head(zero_point_ptr, b, h, H, Tk, ZERO_POINT))
    divisor = tl.maximum(code_sum, 1).to(tl.float32)  # a row without keys gives zeros
    step = tl.div_rn(tl.broadcast_to(v_scale, (BLOCK_Q,)), divisor)
    write_part(
        acc_a, v_sum_a, v_sum_ptr, code_sum, step, zero_point, b, h, t, Tq, H,
        out_ptr, out_scale_ptr, out_zero_point_ptr, out_smooth_inv_ptr, ONE_LOOK, D, 0, VALUE_A,
    )  # fmt: skip
    if VALUE_B > 0:
        write_part(
            acc_b, v_sum_b, v_sum_ptr, code_sum, step, zero_point, b, h, t, Tq, H,
            out_ptr, out_scale_ptr, out_zero_point_ptr, out_smooth_inv_ptr, ONE_LOOK, D, VALUE_A, VALUE_B,
        )  # fmt: skip


def has_whole_words(v: torch.Tensor) -> bool:
    """Whether copies of 16 bytes reach all of v with tokens inside."""
    return not any(address % 16 for address in (v.data_ptr(), v.stride(0), v.stride(1), v.stride(3)))


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    v_zero_point: torch.Tensor | None,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    out_dtype: torch.dtype,
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    out_smooth_inv: torch.Tensor | None = None,
    strict: bool = False,
    config: tuning.AttentionConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `attention.attention_qk_int8_pv_int8`."""
    (batch, heads, num_queries, head_dim), num_keys = q.shape, k.shape[2]
    out = attention.new_output(q, out_dtype, out_scale)
    if out.numel() == 0:
        return out
    config, block_k = attention.config_of("attention_qk_int8_pv_int8", k, config)
    parts = attention.VALUE_PARTS[head_dim]
    tiles = triton.cdiv(num_queries, config.block_q)
    shared_scale = attention.scale_kind(k_scale) != PER_TOKEN.value
    strict = strict or block_k > MAX_ONE_LOOK or (shared_scale and num_keys <= MAX_STRICT_KEYS)
    with on_device_of(q):
        v_sum = None
        if not (has_tokens_inside(v) and has_whole_words(v)):
            whole_sums = strict or num_keys <= block_k
            v, v_sum = transpose_v.launch(v, sum(parts), block_k, whole_sums)
        memory_keys = v.stride(3)
        run_kernel(
            _attention_qk_int8_pv_int8_kernel, (batch * heads * tiles,),
            q, k, v, out, out_scale, out_zero_point, out_smooth_inv, q_scale, k_scale, v_scale, v_zero_point,
            v_sum, None if key_mask is None else key_mask.view(torch.uint8),
            softmax_scale * attention.LOG2_E, num_queries, num_keys,
            triton.cdiv(num_keys, 16) * 16, heads,
            q.stride(0), k.stride(0), v.stride(0), v.stride(1), v.stride(3),
            q.stride(1), q.stride(2), k.stride(1), k.stride(2),
            Q_SCALE=attention.scale_kind(q_scale), K_SCALE=attention.scale_kind(k_scale),
            V_SCALE=attention.scale_kind(v_scale),
            ZERO_POINT=0 if v_zero_point is None else attention.scale_kind(v_zero_point),
            INLINE_ASM=not INTERPRETED, EVEN_V=triton.cdiv(num_keys, block_k) * block_k <= memory_keys,
            STRICT=strict,
            **attention.shape_constants(head_dim, num_keys, config.block_q, block_k, parts),
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out
