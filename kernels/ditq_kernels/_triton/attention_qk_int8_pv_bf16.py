"""Attention with int8 scores and bf16 values: for long rows, whose small probabilities 8 bits lose.

Like SageAttention (arXiv:2410.02367), with bf16 for its fp16. Keys are looked at once, with a running maximum
(FlashAttention, arXiv:2205.14135); the strict form finds the maximum of the whole row first.
"""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts import softmax_tiles as attention
from ditq_kernels._triton.parts.common import INTERPRETED, on_device_of, run_kernel
from ditq_kernels._triton.parts.softmax_tiles import (
    LOWEST_LOGIT,
    PER_TOKEN,
    load_queries,
    load_rows,
    logits_of,
    row_maximum,
    rows_of_tile,
    scale_of_head,
    scores,
    store_part,
    tile_of_head,
)
from ditq_kernels.launch import tuning


@triton.jit
def accumulate(
    p, v_ptr, rows, acc,
    STRIDE: tl.constexpr, D: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr,
    BF16_DOT: tl.constexpr,
):  # fmt: skip
    """Add bf16 probabilities [BLOCK_Q, BLOCK_K] times bf16 values to acc, in fp32."""
    v = load_rows(v_ptr, rows, STRIDE, D, START, BLOCK)
    if not BF16_DOT:  # the interpreter has no bf16 product
        p, v = p.to(tl.float32), v.to(tl.float32)
    return tl.dot(p, v, acc)


@triton.jit
def _attention_qk_int8_pv_bf16_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,  # [B, H, T, D] int8 twice, bf16; [B, Tq, H, D] float or int8
    out_scale_ptr, out_zero_point_ptr, out_smooth_inv_ptr,  # fp32 [1], int32 [1], fp32 [H * D], or None
    q_scale_ptr, k_scale_ptr, key_mask_ptr,  # fp32 [1], [H] or [B, H, T]; uint8 [B, Tk] or None
    softmax_step, Tq, Tk, H, stride_qb, stride_kb, stride_vb,
    STRIDE_QH: tl.constexpr, STRIDE_QT: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_KT: tl.constexpr,
    STRIDE_VH: tl.constexpr, STRIDE_VT: tl.constexpr,
    Q_SCALE: tl.constexpr, K_SCALE: tl.constexpr, BF16_DOT: tl.constexpr,
    D: tl.constexpr, SCORE_A: tl.constexpr, SCORE_B: tl.constexpr,
    VALUE_A: tl.constexpr, VALUE_B: tl.constexpr,
    EVEN_K: tl.constexpr, ONE_TILE: tl.constexpr,  # Tk is a multiple of, at most BLOCK_K
    STRICT: tl.constexpr,  # the maximum of the row comes first
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, h, t = tile_of_head(Tq, H, BLOCK_Q)
    rows = tl.minimum(t, Tq - 1)  # rows past the end repeat the last one; they are never stored
    q_ptr += b * stride_qb + h * STRIDE_QH
    q_a, q_b = load_queries(q_ptr, rows.to(tl.int64), STRIDE_QT, D, SCORE_A, SCORE_B)
    k_ptr += b * stride_kb + h * STRIDE_KH
    v_ptr += b * stride_vb + h * STRIDE_VH
    k_scale_ptr = scale_of_head(k_scale_ptr, b, h, H, Tk, K_SCALE)
    if key_mask_ptr is not None:
        key_mask_ptr += b * Tk
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
    p_sum = tl.zeros((BLOCK_Q,), tl.float32)
    acc_a = tl.zeros((BLOCK_Q, VALUE_A), tl.float32)
    if VALUE_B > 0:
        acc_b = tl.zeros((BLOCK_Q, VALUE_B), tl.float32)
    for start in range(0, BLOCK_K if ONE_TILE else Tk, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        total = scores(
            q_a, q_b, k_ptr, start, Tk, STRIDE_KT, D, SCORE_A, SCORE_B, EVEN_K, BLOCK_K
        )
        logits = logits_of(total, row_step, k_scale_ptr, key_mask_ptr, keys, Tk, K_SCALE, EVEN_K)
        if ONE_TILE or not STRICT:
            higher = tl.maximum(top, tl.max(logits, 1))
            if not ONE_TILE:
                kept = tl.exp2(top - higher)  # 0 where nothing was attended before
                p_sum *= kept
                acc_a *= kept[:, None]
                if VALUE_B > 0:
                    acc_b *= kept[:, None]
            top = higher
        p = tl.exp2(logits - top[:, None])
        p_sum += tl.sum(p, 1)
        p = p.to(tl.bfloat16)
        v_rows = rows_of_tile(start, Tk, EVEN_K, BLOCK_K)  # keys past the end have probability 0
        v_at = v_ptr + tl.cast(start, tl.int64) * STRIDE_VT
        acc_a = accumulate(p, v_at, v_rows, acc_a, STRIDE_VT, D, 0, VALUE_A, BF16_DOT)
        if VALUE_B > 0:
            acc_b = accumulate(p, v_at, v_rows, acc_b, STRIDE_VT, D, VALUE_A, VALUE_B, BF16_DOT)
    divisor = tl.where(p_sum > 0, p_sum, 1.0)  # a row without keys gives zeros
    step = tl.div_rn(tl.full((BLOCK_Q,), 1.0, tl.float32), divisor)[:, None]
    store_part(
        acc_a * step, b, h, t, Tq, H, out_ptr, out_scale_ptr, out_zero_point_ptr, out_smooth_inv_ptr,
        D, 0, VALUE_A,
    )  # fmt: skip
    if VALUE_B > 0:
        store_part(
            acc_b * step, b, h, t, Tq, H, out_ptr, out_scale_ptr, out_zero_point_ptr, out_smooth_inv_ptr,
            D, VALUE_A, VALUE_B,
        )  # fmt: skip


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    out_dtype: torch.dtype,
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    out_smooth_inv: torch.Tensor | None = None,
    strict: bool = False,
    config: tuning.AttentionConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `attention.attention_qk_int8_pv_bf16`."""
    (batch, heads, num_queries, head_dim), num_keys = q.shape, k.shape[2]
    out = attention.new_output(q, out_dtype, out_scale)
    if out.numel() == 0:
        return out
    config, block_k = attention.config_of("attention_qk_int8_pv_bf16", k, config)
    parts = attention.VALUE_PARTS[head_dim]
    tiles = triton.cdiv(num_queries, config.block_q)
    with on_device_of(q):
        run_kernel(
            _attention_qk_int8_pv_bf16_kernel, (batch * heads * tiles,),
            q, k, v, out, out_scale, out_zero_point, out_smooth_inv, q_scale, k_scale,
            None if key_mask is None else key_mask.view(torch.uint8),
            softmax_scale * attention.LOG2_E, num_queries, num_keys, heads,
            q.stride(0), k.stride(0), v.stride(0),
            q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2),
            Q_SCALE=attention.scale_kind(q_scale), K_SCALE=attention.scale_kind(k_scale),
            BF16_DOT=not INTERPRETED, STRICT=strict,
            **attention.shape_constants(head_dim, num_keys, config.block_q, block_k, parts),
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out
