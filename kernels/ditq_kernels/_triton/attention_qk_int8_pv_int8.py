"""Attention on int8 tensor cores throughout: scores and values, summed in int32 and never rescaled.

Probabilities are codes 0 to 255 of exp2(logit - row maximum), stored as `code - 128` because tensor
cores here multiply signed by signed. INT-FlashAttention (arXiv:2409.16997) has 127 levels and a
running maximum.
"""

import torch
import triton
import triton.language as tl

from ditq_kernels import tuning
from ditq_kernels._triton import attention, transpose_v
from ditq_kernels._triton.attention import (
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
from ditq_kernels._triton.common import ROUND_TO_INTEGER, on_device_of


@triton.jit
def probability_codes(logits, top):
    """int32 in 0..255: 255 * exp2(logits - top), ties to even; the fused step rounds only once."""
    p = tl.exp2(logits - top[:, None])
    return tl.fma(p, 255.0, ROUND_TO_INTEGER).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def accumulate(stored, vt_ptr, keys, acc, PADDED_K, START: tl.constexpr, BLOCK: tl.constexpr):
    """Add stored codes [BLOCK_Q, BLOCK_K] times value codes to acc, in int32."""
    d = START + tl.arange(0, BLOCK)
    v = tl.load(vt_ptr + d[None, :] * PADDED_K + keys[:, None])
    return tl.dot(stored, v, acc, out_dtype=tl.int32)


@triton.jit
def write_part(
    acc, code_sum, step, zero_point, v_sum_ptr, out_ptr, b, h, t, Tq, H,
    D: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Undo the stored offset and the zero point, exactly; scale; store."""
    v_sum = tl.load(v_sum_ptr + START + tl.arange(0, BLOCK))
    total = acc + 128 * v_sum[None, :] - zero_point * code_sum[:, None]
    store_part(out_ptr, total.to(tl.float32) * step[:, None], b, h, t, Tq, H, D, START, BLOCK)


@triton.jit
def _attention_qk_int8_pv_int8_kernel(
    q_ptr, k_ptr, vt_ptr, out_ptr,  # [B, H, T, D] int8 twice, [B, H, WIDTH, PADDED_K] int8, [B, Tq, H, D]
    q_scale_ptr, k_scale_ptr, v_scale_ptr,  # fp32: [1], [H] or [B, H, T]; v: [B, H]
    zero_point_ptr, v_sum_ptr, key_mask_ptr,  # int32 [1] or [H] or None, [B, H, WIDTH], uint8 [B, Tk] or None
    softmax_step, Tq, Tk, PADDED_K, H, stride_qb, stride_kb,
    STRIDE_QH: tl.constexpr, STRIDE_QT: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_KT: tl.constexpr,
    Q_SCALE: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, ZERO_POINT: tl.constexpr,
    D: tl.constexpr, SCORE_A: tl.constexpr, SCORE_B: tl.constexpr,
    VALUE_A: tl.constexpr, VALUE_B: tl.constexpr,
    EVEN_K: tl.constexpr, ONE_TILE: tl.constexpr,  # Tk is a multiple of, at most BLOCK_K
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, h, t = tile_of_head(Tq, H, BLOCK_Q)
    rows = tl.minimum(t, Tq - 1)  # rows past the end repeat the last one; they are never stored
    q_ptr += b * stride_qb + h * STRIDE_QH
    q_a, q_b = load_queries(q_ptr, rows.to(tl.int64), STRIDE_QT, D, SCORE_A, SCORE_B)
    k_ptr += b * stride_kb + h * STRIDE_KH
    vt_ptr += (b * H + h) * (VALUE_A + VALUE_B) * PADDED_K
    v_sum_ptr += (b * H + h) * (VALUE_A + VALUE_B)
    k_scale_ptr = scale_of_head(k_scale_ptr, b, h, H, Tk, K_SCALE)
    if key_mask_ptr is not None:
        key_mask_ptr += b * Tk
    q_scale_at = scale_of_head(q_scale_ptr, b, h, H, Tq, Q_SCALE)
    if Q_SCALE == PER_TOKEN:
        q_scale_at += rows
    row_step = tl.broadcast_to(tl.load(q_scale_at) * softmax_step, (BLOCK_Q,))
    if not ONE_TILE:
        top = row_maximum(
            q_a, q_b, row_step, k_ptr, k_scale_ptr, key_mask_ptr, Tk,
            STRIDE_KT, D, SCORE_A, SCORE_B, K_SCALE, EVEN_K, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    code_sum = tl.zeros((BLOCK_Q,), tl.int32)
    acc_a = tl.zeros((BLOCK_Q, VALUE_A), tl.int32)
    if VALUE_B > 0:
        acc_b = tl.zeros((BLOCK_Q, VALUE_B), tl.int32)
    for start in range(0, BLOCK_K if ONE_TILE else Tk, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        total = scores(
            q_a, q_b, k_ptr, start, Tk, STRIDE_KT, D, SCORE_A, SCORE_B, EVEN_K, BLOCK_K
        )
        logits = logits_of(total, row_step, k_scale_ptr, key_mask_ptr, keys, Tk, K_SCALE, EVEN_K)
        if ONE_TILE:
            top = tl.maximum(tl.max(logits, 1), LOWEST_LOGIT)
        codes = probability_codes(logits, top)
        code_sum += tl.sum(codes, 1)
        stored = (codes - 128).to(tl.int8)
        acc_a = accumulate(stored, vt_ptr, keys, acc_a, PADDED_K, 0, VALUE_A)
        if VALUE_B > 0:
            acc_b = accumulate(stored, vt_ptr, keys, acc_b, PADDED_K, VALUE_A, VALUE_B)
    v_scale = tl.load(scale_of_head(v_scale_ptr, b, h, H, Tk, V_SCALE))
    zero_point = 0
    if zero_point_ptr is not None:
        zero_point = tl.load(scale_of_head(zero_point_ptr, b, h, H, Tk, ZERO_POINT))
    divisor = tl.maximum(code_sum, 1).to(tl.float32)  # a row without keys gives zeros
    step = tl.div_rn(tl.broadcast_to(v_scale, (BLOCK_Q,)), divisor)
    write_part(
        acc_a, code_sum, step, zero_point, v_sum_ptr, out_ptr, b, h, t, Tq, H, D, 0, VALUE_A
    )
    if VALUE_B > 0:
        write_part(
            acc_b, code_sum, step, zero_point, v_sum_ptr, out_ptr, b, h, t, Tq, H, D, VALUE_A, VALUE_B
        )


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
    config: tuning.AttentionConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `attention.attention_qk_int8_pv_int8`."""
    (batch, heads, num_queries, head_dim), num_keys = q.shape, k.shape[2]
    out = attention.new_output(q, out_dtype)
    if out.numel() == 0:
        return out
    config, block_k = attention.config_of("attention_qk_int8_pv_int8", k, config)
    parts = attention.VALUE_PARTS[head_dim]
    tiles = triton.cdiv(num_queries, config.block_q)
    with on_device_of(q):
        vt, v_sum = transpose_v.launch(v, sum(parts), block_k)
        _attention_qk_int8_pv_int8_kernel[(batch * heads * tiles,)](
            q, k, vt, out, q_scale, k_scale, v_scale, v_zero_point, v_sum,
            None if key_mask is None else key_mask.view(torch.uint8),
            softmax_scale * attention.LOG2_E, num_queries, num_keys, vt.shape[2], heads,
            q.stride(0), k.stride(0), q.stride(1), q.stride(2), k.stride(1), k.stride(2),
            Q_SCALE=attention.scale_kind(q_scale), K_SCALE=attention.scale_kind(k_scale),
            V_SCALE=attention.scale_kind(v_scale),
            ZERO_POINT=0 if v_zero_point is None else attention.scale_kind(v_zero_point),
            **attention.shape_constants(head_dim, num_keys, config.block_q, block_k, parts),
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out
