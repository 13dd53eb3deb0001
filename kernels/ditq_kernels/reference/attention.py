"""Attention in plain torch, as `reference`: every line is one correctly rounded step, a few heads at a time.

It is strict always.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from ditq_kernels.codes import numerics
from ditq_kernels.reference import linear as reference

LOGITS_AT_ONCE = 2**18  # 2 MiB in fp64


def attention_qk_int8_pv_int8(
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
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    out_smooth_inv: torch.Tensor | None = None,
    strict: bool = True,
) -> torch.Tensor:
    """Attention [B, H, Tq, D] on int8 codes; probabilities are codes 0 to 255 of the row maximum."""

    def weigh(p: torch.Tensor, values: torch.Tensor, *scale_and_zero: Any) -> torch.Tensor:
        step, zero = scale_and_zero
        codes = (p.double() * numerics.INT8_LEVELS).round_()  # ties to even, of the exact product
        # integers below 2**53 all the way
        exact = reference.exact_dtype(v.device, v.shape[2] * numerics.INT8_LEVELS**2)
        codes, values = codes.to(exact), values.to(exact)
        if zero is not None:
            values -= zero
        code_sum = codes.sum(dim=2, keepdim=True).clamp_min_(1).float()  # no keys: 0 / 1
        return (codes @ values).float().mul_(step / code_sum)

    step = v_scale[..., None, None]
    zero = None if v_zero_point is None else v_zero_point[:, None, None]
    y = _by_heads(weigh, q, k, q_scale, k_scale, softmax_scale, key_mask, v, step, zero)
    return _attention_output(y, out_dtype, out_scale, out_zero_point, out_smooth_inv)


def attention_qk_int8_pv_bf16(
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
    strict: bool = True,
) -> torch.Tensor:
    """Attention [B, H, Tq, D] on int8 queries and keys, bf16 probabilities and values."""

    def weigh(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        p_sum = p.double().sum(dim=2, keepdim=True).float()
        inv_sum = 1 / torch.where(p_sum > 0, p_sum, 1.0)  # no keys: 0 / 1
        return (p.bfloat16().double() @ values.double()).float().mul_(inv_sum)

    y = _by_heads(weigh, q, k, q_scale, k_scale, softmax_scale, key_mask, v)
    return _attention_output(y, out_dtype, out_scale, out_zero_point, out_smooth_inv)


def _by_heads(
    weigh: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    *of_values: torch.Tensor | None,
) -> torch.Tensor:
    """`weigh` of the probabilities and of_values, [B, H, Tq, D] fp32, for a few heads at a time.

    Logits of all heads would fit into no cache, and those of long sequences into no memory.
    """
    step = softmax_scale * math.log2(math.e)
    row_step = _per_row(q_scale) * torch.tensor(step, dtype=torch.float32, device=q.device)
    mask = None if key_mask is None else key_mask[:, None, None]
    inputs = (q, k, row_step, _per_row(k_scale).transpose(-2, -1), mask, *of_values)
    at_once = max(1, LOGITS_AT_ONCE // max(1, q.shape[2] * k.shape[2]))
    groups = zip(*(_split_heads(x, q.shape[:2], at_once) for x in inputs), strict=True)
    parts = [weigh(_probabilities(*group[:5]), *group[5:]) for group in groups]
    return torch.cat(parts).unflatten(0, q.shape[:2])


def _split_heads(x: torch.Tensor | None, shape: torch.Size, at_once: int) -> tuple[Any, ...]:
    """Some heads at a time [G, R, C] of what broadcasts to [B, H, R, C]."""
    if x is None:
        return (None,) * max(1, -(-shape.numel() // at_once))
    return x.expand(*shape, -1, -1).flatten(0, 1).split(at_once)


def _probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    row_step: torch.Tensor,
    column_step: torch.Tensor,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """exp2(logit - row maximum), fp32 [G, Tq, Tk] of G heads; rows without keys are zero."""
    exact = reference.exact_dtype(q.device, q.shape[2] * 2**14)
    logits = (q.to(exact) @ k.to(exact).transpose(1, 2)).float().mul_(row_step * column_step)
    if key_mask is not None:
        logits.masked_fill_(~key_mask, -torch.inf)
    top = logits.amax(dim=2, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    return torch.exp2(logits.sub_(top).double()).float()  # correctly rounded on any device


def _unnormalized_probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """exp2(logit - row maximum), fp32 [B, H, Tq, Tk]; rows without keys are zero."""
    return _by_heads(lambda p: p, q, k, q_scale, k_scale, softmax_scale, key_mask)


def _per_row(scale: torch.Tensor) -> torch.Tensor:
    """[1], [H] or [B, H, T] as something that broadcasts against [B, H, T, 1]."""
    return scale[..., None] if scale.dim() == 3 else scale[:, None, None]


def _attention_output(
    y: torch.Tensor,
    out_dtype: torch.dtype,
    out_scale: torch.Tensor | None,
    out_zero_point: torch.Tensor | None,
    out_smooth_inv: torch.Tensor | None,
) -> torch.Tensor:
    if out_scale is None or out_zero_point is None:
        return _by_token(y.to(out_dtype))
    heads, head_dim = y.shape[1], y.shape[3]
    smooth_inv = None if out_smooth_inv is None else out_smooth_inv.view(heads, 1, head_dim)
    return _by_token(
        numerics.quantize_asymmetric(reference.smoothed(y, smooth_inv), out_scale, out_zero_point)
    )


def _by_token(y: torch.Tensor) -> torch.Tensor:
    """The same values over [B, T, H, D] memory."""
    batch, heads, num_tokens, head_dim = y.shape
    out = y.new_empty((batch, num_tokens, heads, head_dim)).transpose(1, 2)
    return out.copy_(y)
