"""Queries or keys of an attention to int8: norm, rotation, shift and quantizer in one read and one write."""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import (
    asymmetric_codes,
    on_device_of,
    rounded_steps,
    run_kernel,
)
from ditq_kernels._triton.parts.rows import INT8_MAX, scale_of_steps

VALUES_OF_A_PROGRAM = 2048  # fp32 values that a program holds, where heads are normed apart
VALUES_OF_A_WARP = 1024


@triton.jit
def load_channels(x_ptr, h, d, H, D, stride_xh):
    """fp32 [heads, channels]; zero outside."""
    inside = (h < H)[:, None] & (d < D)[None, :]
    return tl.load(x_ptr + h[:, None] * stride_xh + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def normed(x, inv_rms, weight_ptr, h, d, H, D, WIDE: tl.constexpr):
    """Times 1 / rms, times the weight, in this order."""
    if WIDE:
        inside = (h < H)[:, None] & (d < D)[None, :]
        weight = tl.load(weight_ptr + h[:, None] * D + d[None, :], mask=inside, other=0.0)
    else:
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)[None, :]
    return x * inv_rms * weight.to(tl.float32)


@triton.jit
def _quantize_heads_kernel(
    x_ptr, norm_weight_ptr, cos_ptr, sin_ptr,  # [B, T, H, D] float, [D] or [H * D] float, [T, C] fp32 twice
    shift_ptr, in_scale_ptr,  # [B, H, D] fp32, [H] or [B, H] fp32, each or None
    q_ptr, scale_ptr,  # [B, H, T, D] int8, [B, H, T] fp32 or None
    eps, T, H, stride_xb, stride_xt, stride_xh, stride_cb, stride_ct, stride_cd, stride_sb,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
    WIDE: tl.constexpr,  # the norm is over all heads, which the program holds
    INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr,  # tables have a column for each pair
):  # fmt: skip
    token = tl.program_id(0)
    b, t = (token // T).to(tl.int64), token % T
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK_D)
    x_ptr += b * stride_xb + t.to(tl.int64) * stride_xt
    y = load_channels(x_ptr, h, d, H, D, stride_xh)
    if norm_weight_ptr is not None:
        squares = tl.sum(y * y, axis=1)  # [HEADS]
        width = tl.full((HEADS,), 1.0, tl.float32) * D
        if WIDE:
            squares = tl.zeros_like(squares) + tl.sum(squares, axis=0)
            width = width * H
        rms = tl.sqrt_rn(tl.div_rn(squares, width) + eps)
        inv_rms = tl.div_rn(tl.full((HEADS,), 1.0, tl.float32), rms)[:, None]
        y = normed(y, inv_rms, norm_weight_ptr, h, d, H, D, WIDE)
    if cos_ptr is not None:
        if INTERLEAVED:  # a thread has both channels of a pair
            pair = d // 2
            first, second = tl.split(y.reshape(HEADS, BLOCK_D // 2, 2))
            turned = tl.join(-second, first).reshape(HEADS, BLOCK_D)
        else:
            partner, pair = (d + D // 2) % D, d % (D // 2)
            other = load_channels(x_ptr, h, partner, H, D, stride_xh)  # of the same cache lines
            if norm_weight_ptr is not None:
                other = normed(other, inv_rms, norm_weight_ptr, h, partner, H, D, WIDE)
            turned = tl.where((d < D // 2)[None, :], -other, other)
        column = pair if PAIRS else d
        at = b * stride_cb + t.to(tl.int64) * stride_ct + column * stride_cd
        cos = tl.load(cos_ptr + at, mask=d < D, other=0.0)[None, :]
        sin = tl.load(sin_ptr + at, mask=d < D, other=0.0)[None, :]
        y = y * cos + turned * sin
    inside = (h < H)[:, None] & (d < D)[None, :]
    if shift_ptr is not None:
        at = shift_ptr + ((b * H + h) * D)[:, None] + d[None, :]
        y -= tl.load(at, mask=inside, other=0.0)
    rows = (b * H + h) * T + t
    if in_scale_ptr is None:
        y = tl.where(inside, y, 0.0)
        scale, inv_scale = scale_of_steps(tl.max(tl.abs(y), axis=1), INT8_MAX, HEADS)
        codes = rounded_steps(y, inv_scale, -INT8_MAX, INT8_MAX)
        tl.store(scale_ptr + rows, scale, mask=h < H)
    else:
        step = tl.load(in_scale_ptr + b * stride_sb + h, mask=h < H, other=1.0)
        inv_step = tl.div_rn(tl.full((HEADS,), 1.0, tl.float32), step)[:, None]
        codes = asymmetric_codes(y, inv_step, tl.full((), 0, tl.int32))
    tl.store(q_ptr + rows[:, None] * D + d[None, :], codes.to(tl.int8), mask=inside)


def shape_of_program(heads: int, head_dim: int, wide: bool) -> tuple[int, int, int]:
    """Heads of a program, their padded width, warps."""
    block_d = triton.next_power_of_2(head_dim)
    held = triton.next_power_of_2(heads)
    if not wide:
        held = min(held, max(1, VALUES_OF_A_PROGRAM // block_d))
    return held, block_d, min(16, max(1, held * block_d // VALUES_OF_A_WARP))


def launch(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments as in `heads.quantize_heads`."""
    batch, tokens, heads, head_dim = x.shape
    q = torch.empty((batch, heads, tokens, head_dim), dtype=torch.int8, device=x.device)
    num_scales = batch if scale is None else 0
    scales = torch.empty((num_scales, heads, tokens), dtype=torch.float32, device=x.device)
    if q.numel() == 0:
        return q, scales
    wide = norm_weight is not None and norm_weight.numel() != head_dim
    held, block_d, num_warps = shape_of_program(heads, head_dim, wide)
    table = (0, 0, 0)
    if cos is not None:
        per_image = cos.dim() == 3 and cos.shape[0] > 1
        table = (cos.stride(0) if per_image else 0, cos.stride(-2), cos.stride(-1))
    with on_device_of(x):
        run_kernel(
            _quantize_heads_kernel, (batch * tokens, triton.cdiv(heads, held)),
            x, norm_weight, cos, sin, shift, scale, q, scales if scale is None else None,
            eps, tokens, heads, x.stride(0), x.stride(1), x.stride(2), *table,
            scale.stride(0) if scale is not None and scale.dim() == 2 else 0,
            D=head_dim, BLOCK_D=block_d, HEADS=held, WIDE=wide, INTERLEAVED=interleaved,
            PAIRS=cos is not None and cos.shape[-1] != head_dim,
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return q, scales
