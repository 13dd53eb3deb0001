"""The GEMM ops where int8 is multiplied faster than fp32; arguments are those of the definitions in `reference`.

Results are the reference's to the bit; where torch splits work among threads, GELU keeps its promise of `ops` only.
"""

from functools import partial
from typing import Any

import torch

from ditq_kernels._cpu.epilogue import dequantized_blocks
from ditq_kernels._cpu.per_group import scaled_sums
from ditq_kernels._cpu.product import product
from ditq_kernels.codes import numerics
from ditq_kernels.reference import fused as reference_fused
from ditq_kernels.reference import linear as reference


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
    *branch: Any,
    **named: Any,
) -> torch.Tensor:
    """As `reference.gemm_w4a8_per_group`."""
    total = scaled_sums(q, packed, weight_scale, weight_zero, zero_point)
    return _linear(total, scale, None, bias, None, None, out_dtype, *branch, **named)


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
    total, dequantize = _sums(q, weight, group_scale, group_offset, dequantize)
    out = residual.new_empty(residual.shape)
    samples = (
        None
        if gate is None
        else reference.by_sample(torch.arange(len(gate), device=q.device), len(q))
    )
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
    total, dequantize = _sums(q, weight, group_scale, group_offset, dequantize)
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
    *dequantize: Any,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """As `reference_fused.gemm`."""
    total, (*left, bias_index, lora_x, lora_up) = _sums(
        q, weight, group_scale, group_offset, dequantize
    )
    return _linear(total, *left, out_dtype, bias_index, lora_x, lora_up)


def _sums(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    dequantize: tuple[Any, ...],
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Sums of weights as in `gemm_fused.parts_of`, and what `dequantized_blocks` is left to do with them."""
    if group_scale is None and group_offset is not None:
        scale, weight_scale, bias, zero_point, _, *branch = dequantize
        total = scaled_sums(q, weight, weight_scale, group_offset, zero_point)
        return total, (scale, None, bias, None, None, *branch)
    return product(q, weight, group_scale, group_offset), dequantize


def _linear(
    total: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor | None,
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
gemm_many = partial(reference_fused.gemm_many, multiply=_gemm)
