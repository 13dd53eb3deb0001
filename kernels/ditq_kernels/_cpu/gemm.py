"""The GEMM ops where int8 is multiplied faster than fp32; arguments are those of the definitions in `reference`.

Results are the reference's to the bit; where torch splits work among threads, GELU keeps its promise of `ops` only.
"""

from functools import partial
from typing import Any

import torch

from ditq_kernels import numerics, reference, reference_fused
from ditq_kernels._cpu.epilogue import dequantized_blocks
from ditq_kernels._cpu.product import product


def gemm_w8a8(q: torch.Tensor, weight: torch.Tensor, *stages: Any, **named: Any) -> torch.Tensor:
    """As `reference.gemm_w8a8`; its arguments from `scale` on are `stages`."""
    return _linear(product(q, weight), *stages, **named)


def gemm_w4a8(
    q: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    *stages: Any,
    **named: Any,
) -> torch.Tensor:
    """As `reference.gemm_w4a8`; its arguments from `weight_scale` on are `stages`."""
    return _linear(product(q, packed, group_scale, group_offset), scale, *stages, **named)


def gemm_residual(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    residual: torch.Tensor,
    gate: torch.Tensor | None,
    *dequantize: Any,
) -> torch.Tensor:
    """As `reference_fused.gemm_residual`."""
    total = product(q, weight, group_scale, group_offset)
    out = residual.new_empty(residual.shape)
    samples = None if gate is None else reference.by_sample(torch.arange(len(gate)), len(q))
    for rows, y in dequantized_blocks(total, *dequantize):
        if gate is not None and samples is not None:
            y.mul_(gate[samples[rows]])
        out[rows] = y.add_(residual[rows])
    return out


def gemm_gelu_quantize(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    out_scale: torch.Tensor,
    out_zero_point: torch.Tensor,
    out_smooth_inv: torch.Tensor | None,
    *dequantize: Any,
) -> torch.Tensor:
    """As `reference_fused.gemm_gelu_quantize`."""
    total = product(q, weight, group_scale, group_offset)
    out = q.new_empty(total.shape)
    for rows, y in dequantized_blocks(total, *dequantize):
        y = reference_fused.gelu(y)
        if out_smooth_inv is not None:
            y.mul_(out_smooth_inv)
        out[rows] = numerics.quantize_asymmetric(y, out_scale, out_zero_point)
    return out


def _gemm(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    *branch: Any,
) -> torch.Tensor:
    """As `reference_fused.gemm`."""
    total = product(q, weight, group_scale, group_offset)
    return _linear(total, scale, weight_scale, bias, zero_point, weight_sum, torch.float32, *branch)


def _linear(
    total: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
    *branch: Any,
    **named: Any,
) -> torch.Tensor:
    dequantize = (scale, weight_scale, bias, zero_point, weight_sum, *branch)
    in_place = out_dtype == torch.float32
    reuse = total.dtype == out_dtype
    out = total if reuse else total.new_empty(total.shape, dtype=out_dtype)
    for rows, y in dequantized_blocks(total, *dequantize, **named, into=out if in_place else None):
        if not in_place:
            out[rows] = y
    return out


gemm_qkv_quantize = partial(reference_fused.gemm_qkv_quantize, multiply=_gemm)
