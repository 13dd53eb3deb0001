"""Float activations times integer weights, for the few rows of modulation layers: weights are read once.

An fp32 activation is the sum of three bf16 values, exactly, and int8 weights are exact in bf16, so three products on
bf16 tensor cores have the accuracy of fp32. A 16-bit activation needs one (bf16) or two (fp16).
"""

import torch
import triton
import triton.language as tl

from ditq_kernels._triton.parts.common import INTERPRETED, on_device_of, run_kernel
from ditq_kernels.launch import tuning

PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@triton.jit
def add_products(total, x, weight, PARTS: tl.constexpr, BF16_DOT: tl.constexpr):
    """Add x [BLOCK_B, BLOCK_K] fp32 times int8 weights [BLOCK_N, BLOCK_K] to the fp32 total."""
    if BF16_DOT:
        weight = tl.trans(weight.to(tl.bfloat16))
        for _ in tl.static_range(PARTS):
            part = x.to(tl.bfloat16)
            total = tl.dot(part, weight, total)
            x -= part.to(tl.float32)
    else:  # the interpreter has no bf16 product
        weight = tl.trans(weight.to(tl.float32))
        for _ in tl.static_range(PARTS):
            part = x.to(tl.bfloat16).to(tl.float32)
            total = tl.dot(part, weight, total)
            x -= part
    return total


@triton.jit
def load_inputs(x_at, k, K):
    """fp32 columns k of x, zero past K."""
    return tl.load(x_at + k[None, :], mask=(k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _weight_only_kernel(
    x_ptr, weight_ptr, out_ptr,  # [B, K] float, [N, K] int8 or [N, K / 2] bytes, [B, N] float
    group_scale_ptr, group_offset_ptr,  # [N, J] uint8 and int8, or None
    weight_scale_ptr, bias_ptr,  # [N] fp32, [N] fp32 or None
    B, N, K, stride_xb, stride_wn, stride_gn, stride_fn, stride_ob,
    GROUP_SIZE: tl.constexpr, PARTS: tl.constexpr, BF16_DOT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    b = tl.program_id(0) // tiles_n * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows past the end read the last row instead of needing a mask; they are never stored
    real_n = tl.minimum(n, N - 1).to(tl.int64)
    x_at = x_ptr + (tl.minimum(b, B - 1).to(tl.int64) * stride_xb)[:, None]
    weight_at = weight_ptr + (real_n * stride_wn)[:, None]
    total = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if group_scale_ptr is None:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            weight = tl.load(weight_at + k[None, :], mask=(k < K)[None, :], other=0)
            total = add_products(total, load_inputs(x_at, k, K), weight, PARTS, BF16_DOT)
    else:
        for start in range(0, K, BLOCK_K):  # BLOCK_K divides the group size, and so K
            byte = start // 2 + tl.arange(0, BLOCK_K // 2)
            group = start // GROUP_SIZE
            codes = tl.load(weight_at + byte[None, :]).to(tl.int32)
            scale = tl.load(group_scale_ptr + real_n * stride_gn + group).to(tl.int32)[:, None]
            offset = tl.load(group_offset_ptr + real_n * stride_fn + group).to(tl.int32)[:, None]
            even = ((codes & 15) * scale + offset).to(tl.int8)
            odd = ((codes >> 4) * scale + offset).to(tl.int8)
            total = add_products(total, load_inputs(x_at, byte * 2, K), even, PARTS, BF16_DOT)
            total = add_products(total, load_inputs(x_at, byte * 2 + 1, K), odd, PARTS, BF16_DOT)
    y = total * tl.load(weight_scale_ptr + real_n)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + real_n)[None, :]
    at = out_ptr + (b.to(tl.int64) * stride_ob)[:, None] + n[None, :]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(b < B)[:, None] & (n < N)[None, :])


def launch(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: tuning.TileConfig | None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `ops.linear_w8` and `ops.linear_w4`."""
    (batch, in_features), out_features = x.shape, weight.shape[0]
    out = torch.empty((batch, out_features), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    if config is None:
        config = tuning.tile_config(op, tuning.tables_of(x.device), batch, in_features)
    group_size, strides = 1, (0, 0)
    if group_scale is not None and group_offset is not None:
        group_size = in_features // group_scale.shape[1]
        strides = group_scale.stride(0), group_offset.stride(0)
    tiles = triton.cdiv(batch, config.block_t) * triton.cdiv(out_features, config.block_n)
    with on_device_of(x):
        run_kernel(
            _weight_only_kernel, (tiles,),
            x, weight, out, group_scale, group_offset, weight_scale, bias,
            batch, out_features, in_features,
            x.stride(0), weight.stride(0), *strides, out.stride(0),
            **group_constants(group_size, config.block_k),
            PARTS=PARTS[x.dtype], BF16_DOT=not INTERPRETED,
            BLOCK_B=config.block_t, BLOCK_N=config.block_n,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def group_constants(group_size: int, block_k: int) -> dict[str, int]:
    """Constants of the kernel: a tile of block_k inputs at most, inside one group; group_size 1 means no groups."""
    inside = block_k if group_size == 1 else min(block_k, group_size & -group_size)
    return {"GROUP_SIZE": group_size, "BLOCK_K": inside}
