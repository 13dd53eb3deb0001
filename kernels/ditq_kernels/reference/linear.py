"""Every op in plain torch: specification, default implementation and oracle. Obvious and slow.

Floats are fp32 and every line is one correctly rounded step, so a kernel can match bit for bit.
Arguments are trusted: `ops.py` checked them.
"""

from typing import Any

import torch

from ditq_kernels.codes import numerics, packing
from ditq_kernels.codes.products import ieee_product, is_ieee
from ditq_kernels.codes.weights_w4g import dequantize_w4g

EXACT_FP32_INPUTS = 2**24 // 2**14  # inputs whose int8 products sum exactly in fp32
FLOAT_ROWS = 128  # weights widened to fp32 at a time, where each is used for a few rows only


def quantize_per_token(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    asymmetric: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Int8 codes [T, K], one scale a row [T], and one zero point a row [T] if asymmetric, else [0]."""
    x = smoothed(shifted(x, group_shift, group_index), smooth_inv)
    if asymmetric:
        scale, zero_point = numerics.asymmetric_scale(x.amin(dim=1), x.amax(dim=1))
        codes = numerics.quantize_asymmetric(x, scale[:, None], zero_point[:, None])
        return codes.contiguous(), scale, zero_point
    scale = numerics.symmetric_scale(x.abs().amax(dim=1))
    codes = numerics.quantize_symmetric(x, scale[:, None])
    return codes.contiguous(), scale, codes.new_empty(0, dtype=torch.int32)


def quantize_static(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Int8 codes [T, K] with one given scale, or one for each head [H] of K / H columns."""
    x = smoothed(shifted(x, group_shift, group_index), smooth_inv)
    heads = x.unflatten(1, (len(scale), -1))  # [T, H, D]
    if zero_point is None:
        zero_point = torch.zeros(1, dtype=torch.int32, device=x.device)
    return numerics.quantize_asymmetric(heads, scale[:, None], zero_point).flatten(1).contiguous()


def gemm_w8a8(
    q: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
) -> torch.Tensor:
    """Int8 activations [T, K] times int8 weights [N, K], dequantized to [T, N]."""
    total = integer_matmul(q, weight)
    if zero_point is not None and weight_sum is not None:
        total -= zero_point[:, None] * weight_sum  # sum of (q - zero_point) * weight
    real_step = scale[:, None] * weight_scale  # scales meet first: static equals per token, bitwise
    y = total.float().mul_(real_step)
    return _with_branch_and_bias(y, bias, bias_index, lora_x, lora_up).to(out_dtype)


def _with_branch_and_bias(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    bias_index: torch.Tensor | None,
    lora_x: torch.Tensor | None,
    lora_up: torch.Tensor | None,
) -> torch.Tensor:
    """Add to y in place."""
    if lora_x is not None and lora_up is not None:
        y += ieee_product(lora_x.float(), lora_up.float())
    if bias is not None:
        y += bias if bias_index is None else by_sample(bias[bias_index], len(y))
    return y


def by_sample(values: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """One row for each token from one for each sample: [B, N] to [T, N]."""
    return values.repeat_interleave(num_tokens // len(values), dim=0)


def gemm_w4a8(
    q: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    *epilogue: Any,
    **stages: Any,
) -> torch.Tensor:
    """The same on the int8 weights that progressive int4 codes stand for."""
    weight = packing.expand_w4p(packed, group_scale, group_offset)
    return gemm_w8a8(q, weight, scale, *epilogue, **stages)


def lora_down(
    q: torch.Tensor, down: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> torch.Tensor:
    """Int8 activations [T, K] times the first factor [R, K], dequantized to bf16 [T, R]."""
    centred = q.float() if zero_point is None else q.float() - zero_point[:, None]
    return (ieee_product(centred, down.float()) * scale[:, None]).bfloat16()


def linear_w8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Float activations [B, K] times int8 weights, in fp32; the scale comes after the sum."""
    x = x.float()
    blocks = weight.split(FLOAT_ROWS)  # one layer's weights in fp32 would not fit into a cache
    y = torch.cat([ieee_product(x, rows.float()) for rows in blocks], dim=1).mul_(weight_scale)
    if bias is not None:
        y = y + bias
    return y.to(out_dtype)


def linear_w4(
    x: torch.Tensor,
    packed: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The same on the int8 weights that progressive int4 codes stand for."""
    weight = packing.expand_w4p(packed, group_scale, group_offset)
    return linear_w8(x, weight, weight_scale, bias, out_dtype)


def gemm_w4a8_per_group(
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
) -> torch.Tensor:
    """Int8 activations [T, K] times int4 weights, int32 within a group of inputs, fp32 across groups."""
    weight = packing.expand_w4g(packed, weight_zero)
    group_size = q.shape[1] // weight_scale.shape[1]
    y = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.float32, device=q.device)
    parts = zip(q.split(group_size, 1), weight.split(group_size, 1), strict=True)
    for group, (q_part, weight_part) in enumerate(
        parts
    ):  # ascending: the order of fp32 sums is fixed
        total = integer_matmul(q_part, weight_part)
        if zero_point is not None and weight_sum is not None:
            total = total - zero_point[:, None] * weight_sum[:, group]
        y = y + total.float() * weight_scale[:, group]
    y = y * scale[:, None]
    return _with_branch_and_bias(y, bias, bias_index, lora_x, lora_up).to(out_dtype)


def linear_w4_per_group(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Float activations [B, K] times the real weights behind int4 codes, in fp32."""
    y = ieee_product(x.float(), dequantize_w4g(packed, weight_scale, weight_zero))
    if bias is not None:
        y = y + bias
    return y.to(out_dtype)


def integer_matmul(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`q @ weight.T` of int8 matrices as int32 [T, N], exact on any device.

    A product is at most 2**14. Where an fp32 product is IEEE (a CPU at the default precision, so neither TF32 nor
    bf16 passes), 1024 inputs at a time sum to at most 2**24: every partial sum is an integer that fp32 holds, so the
    order of summation cannot matter, and int32 adds the parts. Elsewhere fp64 does the same up to 2**53.
    """
    if exact_dtype(q.device, 2**24) == torch.float64:
        return (q.double() @ weight.double().t()).to(torch.int32)
    parts = zip(q.split(EXACT_FP32_INPUTS, 1), weight.split(EXACT_FP32_INPUTS, 1), strict=True)
    first, *others = ((a.float() @ b.float().t()).to(torch.int32) for a, b in parts)
    for other in others:
        first += other
    return first


def exact_dtype(device: torch.device, largest: int) -> torch.dtype:
    """The type in which a product of integer matrices is exact, where no sum exceeds `largest` and 2**53."""
    return torch.float32 if largest <= 2**24 and is_ieee(device) else torch.float64


def shifted(
    x: torch.Tensor, group_shift: torch.Tensor | None, group_index: torch.Tensor | None
) -> torch.Tensor:
    """Activations in fp32 minus the shift of each sample's group, or minus the only shift."""
    x = x.float()
    if group_shift is None:
        return x
    return x - (group_shift if group_index is None else by_sample(group_shift[group_index], len(x)))


def smoothed(x: torch.Tensor, smooth_inv: torch.Tensor | None) -> torch.Tensor:
    """Activations in fp32, smoothed if the scheme says so."""
    x = x.float()
    return x if smooth_inv is None else x * smooth_inv
