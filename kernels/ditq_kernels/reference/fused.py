"""Fused ops in plain torch, as `reference`: every line is one correctly rounded fp32 step, GELU aside."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ditq_kernels.codes import numerics, packing
from ditq_kernels.reference import linear as reference

Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # with scales and zero points
ALIGNED_TOKENS = 16  # codes that one instruction loads or stores


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
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[T, N] of any GEMM; the weights as in `gemm_fused.parts_of`."""
    if group_scale is None and group_offset is not None:
        return reference.gemm_w4a8_per_group(
            q, weight, scale, weight_scale, group_offset, bias, zero_point, weight_sum, out_dtype, *stages
        )  # fmt: skip
    if group_scale is not None and group_offset is not None:
        weight = packing.expand_w4p(weight, group_scale, group_offset)
    return reference.gemm_w8a8(
        q, weight, scale, weight_scale, bias, zero_point, weight_sum, out_dtype, *stages
    )


def gemm_many(
    q: torch.Tensor,
    weights: Sequence[torch.Tensor],
    group_scales: Sequence[torch.Tensor],
    group_offsets: Sequence[torch.Tensor],
    scale: torch.Tensor,
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    zero_point: torch.Tensor | None,
    weight_sums: Sequence[torch.Tensor],
    bias_index: torch.Tensor | None,
    out_dtype: torch.dtype,
    multiply: Callable[..., torch.Tensor] = gemm,
) -> list[torch.Tensor]:
    """[T, N_i] of each layer; an empty list is None for all. `multiply` runs one, as `gemm` does."""
    found = []
    for i, weight in enumerate(weights):
        group_scale, group_offset, bias, weight_sum = (
            each[i] if each else None for each in (group_scales, group_offsets, biases, weight_sums)
        )
        found.append(
            multiply(
                q, weight, group_scale, group_offset, scale, weight_scales[i], bias, zero_point, weight_sum,
                bias_index, None, None, out_dtype=out_dtype,
            )
        )  # fmt: skip
    return found


def gemm_residual(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    residual: torch.Tensor,
    gate: torch.Tensor | None,
    *dequantize: Any,
) -> torch.Tensor:
    """The residual stream [T, N] plus the GEMM, gated or not, in the stream's dtype."""
    y = gemm(q, weight, group_scale, group_offset, *dequantize)
    if gate is not None:
        _by_sample(y, gate).mul_(gate[:, None])
    return y.add_(residual).to(residual.dtype)


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


def gemm_qkv_quantize(
    q: torch.Tensor,
    weights: Sequence[torch.Tensor],
    group_scales: Sequence[torch.Tensor],
    group_offsets: Sequence[torch.Tensor],
    head_scales: Sequence[torch.Tensor],
    v_zero_point: torch.Tensor | None,
    batch: int,
    heads: int,
    scale: torch.Tensor,
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    zero_point: torch.Tensor | None,
    weight_sums: Sequence[torch.Tensor],
    bias_index: torch.Tensor | None,
    multiply: Callable[..., torch.Tensor] = gemm,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Int8 codes [B, H, T, D] of three GEMMs, laid out as `new_heads` says; `multiply` runs one, as `gemm` does."""
    out = new_heads(q, batch, heads, weights[0].shape[0] // heads)
    zero = q.new_zeros(1, dtype=torch.int32)
    zero_points = (zero, zero, zero if v_zero_point is None else v_zero_point)
    for i, codes in enumerate(out):
        group_scale, group_offset, bias, weight_sum = (
            three[i] if three else None
            for three in (group_scales, group_offsets, biases, weight_sums)
        )
        y = multiply(
            q, weights[i], group_scale, group_offset, scale, weight_scales[i], bias, zero_point, weight_sum,
            bias_index, None, None,
        )  # fmt: skip
        by_head = y.view(batch, -1, heads, codes.shape[3]).transpose(1, 2)
        per_head = (v[:, None, None] for v in (head_scales[i], zero_points[i]))
        codes.copy_(numerics.quantize_asymmetric(by_head, *per_head))
    return out


def new_heads(
    like: torch.Tensor, batch: int, heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unwritten int8 [B, H, T, D] three times for the B * T rows of `like`, as the attention reads them.

    Queries and keys over [B, T, H, D] memory; values over [B, H, D, T'], T padded to aligned rows.
    """
    tokens = len(like) // batch
    padded = -(-tokens // ALIGNED_TOKENS) * ALIGNED_TOKENS
    codes: dict[str, Any] = {"dtype": torch.int8, "device": like.device}
    query, key = (
        torch.empty((batch, tokens, heads, head_dim), **codes).transpose(1, 2) for _ in "qk"
    )
    values = torch.empty((batch, heads, head_dim, padded), **codes)
    return query, key, values[..., :tokens].transpose(2, 3)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form, fp32."""
    return torch.nn.functional.gelu(x.float(), approximate="tanh")


def gelu_quantize(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    asymmetric: bool = False,
) -> Codes:
    """Int8 codes [T, K] of GELU, and one scale a row unless one is given; zero points as `quantize_per_token`."""
    y = reference.shifted(gelu(x), group_shift, group_index)
    return _codes(y, smooth_inv, scale, zero_point, asymmetric)


def adaln_quantize(
    x: torch.Tensor,
    multiplier: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None,
    group_index: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    values_dtype: torch.dtype | None,
    asymmetric: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Int8 codes [T, K] of the modulated norm, scales and zero points as above, and its values if asked."""
    if group_shift is not None and group_index is not None:
        shift = shift - group_shift[group_index]
    y = torch.nn.functional.layer_norm(x.float(), x.shape[1:], eps=eps)
    _by_sample(y, multiplier).mul_(multiplier[:, None]).add_(shift[:, None])
    codes = _codes(y, smooth_inv, scale, zero_point, asymmetric)
    if values_dtype is None:
        return *codes, y.new_empty((0, x.shape[1]))
    return *codes, y.to(values_dtype)


def _by_sample(y: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A view [B, T / B, N] of y [T, N], to meet values [B, N] of its samples."""
    return y.unflatten(0, (len(values), -1))


def _codes(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    asymmetric: bool,
) -> Codes:
    if scale is None or zero_point is None:
        return reference.quantize_per_token(x, smooth_inv, asymmetric=asymmetric)
    codes = reference.quantize_static(x, scale, zero_point, smooth_inv)
    return codes, x.new_empty(0), codes.new_empty(0, dtype=torch.int32)
