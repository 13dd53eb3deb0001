"""The front desk of attention: both public ops document and check, then torch's dispatcher takes over.

B images, H heads, Tq queries, Tk keys, D inputs a head. A name spells the type of each product: QK^T,
then PV. Quantize queries and keys with `quantize_per_token` on [B * H * T, D] rows, viewed back as
[B, H, T], or with `quantize_static` and zero point 0 for one calibrated scale.

The definition does not depend on how a kernel tiles the keys. In fp32, one rounding a step:

    logit = int32(q @ k.T) * ((q_scale * softmax_step) * k_scale), softmax_step = softmax_scale * log2(e)
    p     = exp2(logit - largest logit of the row)

Everything but exp2 is exact or rounded alike on every device, so a strict Triton kernel, whose exp2 is within
2**-22, differs from the reference only where 255 * p lies next to a half-integer (int8 values: by one
code) or by a rounding of p and the order of the sums (bf16 values).

Where keys do not fit in a tile, Triton looks at them once (unless int8 values meet keys that share a scale, where two
looks cost no more): p is relative to the maximum m so far, and sums are multiplied by exp2(m - m') when it grows to m'.
Then p has more exponents to round, at most 2**-22 * (1 + tiles) of itself and ln(2) * 2**-24 times its logit, and
codes have a step of exp2(m - largest) / 255, no coarser than the definition's. So a key's weight differs from the
definition's by at most one code of 255, half of it the definition's own rounding; bf16 weights by 2**-8 of themselves.

Not supported, and refused: biases on logits, causal masks, fewer key heads than query heads.
"""

import torch

from ditq_kernels.checks import attention as checks_attention
from ditq_kernels.checks import tensors as checks
from ditq_kernels.ops import dispatch


def attention_qk_int8_pv_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    *,
    v_zero_point: torch.Tensor | None = None,
    softmax_scale: float,
    key_mask: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    out_smooth_inv: torch.Tensor | None = None,
    strict: bool = False,
) -> torch.Tensor:
    """Attention with int8 scores and int8 values, normalized by the sum of the quantized probabilities.

    code = round(255 * p), ties to even: every row has a 255. With int32 sums over the keys,
    o = sum(code * (v - v_zero_point)) * (v_scale / sum(code)). After INT-FlashAttention
    (arXiv:2409.16997), from which we depart: 255 levels for 127, and sums of codes for sums of unrounded p.
    Long rows with a few dominant keys lose their tail: 1024 keys and a logit deviation of 3 cost 3 %; use
    `attention_qk_int8_pv_bf16` there.

    Args:
        q: [B, H, Tq, D] int8, D contiguous and 32, 64, 72, 88, 96 or 128. Query codes.
        k: [B, H, Tk, D] int8, D contiguous, Tk at least 1 (at most 33025 if strict). Key codes.
        v: [B, H, Tk, D] int8, D contiguous; or over [B, H, D, T'] memory, T' at least Tk, a multiple of 16 to
            be fast: Triton then reads it as it is and otherwise transposes it first. Value codes.
        q_scale: [1], [H] or [B, H, Tq] fp32, positive. Query step.
        k_scale: [1], [H] or [B, H, Tk] fp32, positive. Key step.
        v_scale: [1], [H] or [B, H] fp32, positive. Value step; one of its own for each image and head
            where it is computed from the values, so that images of a batch do not share it.
        v_zero_point: [1] or [H] int32 in [-128, 127]. Code of value 0.0; absent means 0.
        softmax_scale: positive. Multiplies logits, usually D ** -0.5.
        key_mask: [B, Tk] bool, True where a key is attended. An image without any gives zeros.
        out_dtype: fp32 | fp16 | bf16, rounded to nearest even. Left at its default with out_scale.
        out_scale: [1] fp32, positive. Step of the codes, in units of the outputs times out_smooth_inv; absent
            means float outputs.
        out_zero_point: [1] int32 in [-128, 127]. The stored code of 0.0. Needed with out_scale.
        out_smooth_inv: [H * D] fp32. The smoothing of the next layer; absent means none.
        strict: look twice at keys that do not fit in a tile, as the definition says, for 20 to 44 % more
            instructions.

    Returns:
        [B, H, Tq, D] out_dtype over [B, Tq, H, D] memory: `o.transpose(1, 2).flatten(2)` is a view. With
        out_scale int8 codes, what `quantize_static` makes of the fp32 outputs.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or too many keys for a strict int32 sum.
        NotImplementedError: a head dimension without a kernel.
    """
    arguments = (
        q, k, v, q_scale, k_scale, v_scale, v_zero_point, softmax_scale, key_mask, out_dtype,
        out_scale, out_zero_point, out_smooth_inv, strict,
    )  # fmt: skip
    if (made := dispatch.attention_qk_int8_pv_int8.by_plan(arguments)) is not None:
        return made
    op = "attention_qk_int8_pv_int8"
    checks_attention.check_attention(op, q, k, v, torch.int8)
    _check_logits(op, q, k, q_scale, k_scale, softmax_scale, key_mask)
    checks_attention.check_strict_sum(op, k.shape[2], strict)
    heads = q.shape[1]
    checks_attention.check_attention_scale(op, "v_scale", v_scale, v.shape[:2], like=v)
    if v_zero_point is not None:
        checks.check_vector(op, "v_zero_point", v_zero_point, torch.int32, (1, heads), like=q)
    checks_attention.check_attention_output(
        op, q, out_dtype, out_scale, out_zero_point, out_smooth_inv
    )
    return dispatch.attention_qk_int8_pv_int8(*arguments)


def attention_qk_int8_pv_bf16(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    *,
    softmax_scale: float,
    key_mask: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    out_smooth_inv: torch.Tensor | None = None,
    strict: bool = False,
) -> torch.Tensor:
    """Attention with int8 scores and bf16 values.

    o = sum(bf16(p) * v) / sum(p), both sums in fp32. After SageAttention (arXiv:2410.02367), from
    which we depart: bf16 for fp16, and scales of a head or token for those of a block.

    Args:
        q: [B, H, Tq, D] int8, D contiguous and 32, 64, 72, 88, 96 or 128. Query codes.
        k: [B, H, Tk, D] int8, D contiguous, Tk at least 1. Key codes.
        v: [B, H, Tk, D] bf16, D contiguous, finite. Values.
        q_scale: [1], [H] or [B, H, Tq] fp32, positive. Query step.
        k_scale: [1], [H] or [B, H, Tk] fp32, positive. Key step.
        softmax_scale: positive. Multiplies logits, usually D ** -0.5.
        key_mask: [B, Tk] bool, True where a key is attended. An image without any gives zeros.
        out_dtype: fp32 | fp16 | bf16, rounded to nearest even. Left at its default with out_scale.
        out_scale: [1] fp32, positive. Step of the codes, in units of the outputs times out_smooth_inv; absent
            means float outputs.
        out_zero_point: [1] int32 in [-128, 127]. The stored code of 0.0. Needed with out_scale.
        out_smooth_inv: [H * D] fp32. The smoothing of the next layer; absent means none.
        strict: look twice at keys that do not fit in a tile, as the definition says, for 20 to 44 % more
            instructions.

    Returns:
        [B, H, Tq, D] out_dtype over [B, Tq, H, D] memory: `o.transpose(1, 2).flatten(2)` is a view. With
        out_scale int8 codes, what `quantize_static` makes of the fp32 outputs.

    Raises:
        ValueError: a wrong shape, dtype, device or layout.
        NotImplementedError: a head dimension without a kernel.
    """
    arguments = (
        q, k, v, q_scale, k_scale, softmax_scale, key_mask, out_dtype,
        out_scale, out_zero_point, out_smooth_inv, strict,
    )  # fmt: skip
    if (made := dispatch.attention_qk_int8_pv_bf16.by_plan(arguments)) is not None:
        return made
    op = "attention_qk_int8_pv_bf16"
    checks_attention.check_attention(op, q, k, v, torch.bfloat16)
    _check_logits(op, q, k, q_scale, k_scale, softmax_scale, key_mask)
    checks_attention.check_attention_output(
        op, q, out_dtype, out_scale, out_zero_point, out_smooth_inv
    )
    return dispatch.attention_qk_int8_pv_bf16(*arguments)


def _check_logits(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
) -> None:
    checks_attention.check_attention_scale(op, "q_scale", q_scale, q.shape[:3], like=q)
    checks_attention.check_attention_scale(op, "k_scale", k_scale, k.shape[:3], like=k)
    checks_attention.check_softmax_scale(op, softmax_scale)
    if key_mask is not None:
        checks_attention.check_key_mask(op, key_mask, like=k)
