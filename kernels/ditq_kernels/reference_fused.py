"""Fused ops in plain torch, as `reference`: every line is one correctly rounded fp32 step, GELU aside."""

from typing import Any

import torch

from ditq_kernels import numerics, packing, reference


def gemm(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    *stages: torch.Tensor | None,
) -> torch.Tensor:
    """Fp32 [T, N] of either GEMM."""
    if group_scale is not None and group_offset is not None:
        weight = packing.expand_w4p(weight, group_scale, group_offset)
    return reference.gemm_w8a8(
        q, weight, scale, weight_scale, bias, zero_point, weight_sum, torch.float32, *stages
    )


def gemm_residual(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    residual: torch.Tensor,
    gate: torch.Tensor,
    *dequantize: Any,
) -> torch.Tensor:
    """The residual stream [T, N] plus the gated GEMM, in the stream's dtype."""
    y = gemm(q, weight, group_scale, group_offset, *dequantize)
    gated = reference.by_sample(gate, len(y)) * y
    return (residual.float() + gated).to(residual.dtype)


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
    """Int8 codes [T, N] of the GELU of the GEMM."""
    y = gelu(gemm(q, weight, group_scale, group_offset, *dequantize))
    if out_smooth_inv is not None:
        y = y * out_smooth_inv
    return numerics.quantize_asymmetric(y, out_scale, out_zero_point)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form, fp32."""
    return torch.nn.functional.gelu(x.float(), approximate="tanh")
