"""Calls of ops with what `host.cases` leaves out: groups, low ranks, masks, given scales, other layouts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import ditq_kernels as k
from ditq_bench.host.cases import GROUP_SIZE, Shape

RANK, GROUPS = 32, 2  # of a low-rank branch; of timesteps
Calls = dict[str, Callable[[], Any]]


def options(device: torch.device, shape: Shape) -> Calls:
    """Name -> a call; operands are made once, and hold anything."""
    return _rows(device, shape) | _gemms(device, shape) | _attention(device, shape)


def _rows(device: torch.device, shape: Shape) -> Calls:
    x = torch.randn(shape.tokens, shape.inputs, device=device).half()
    one, zero = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    smooth, modulation = (
        torch.ones(shape.inputs, device=device),
        torch.ones(shape.images, shape.inputs, device=device),
    )
    shift: dict[str, Any] = {
        "group_shift": torch.ones(GROUPS, shape.inputs, device=device),
        "group_index": _index(device, shape),
    }
    return {
        "quantize_per_token, symmetric, shifted": partial(k.quantize_per_token, x, smooth, **shift),
        "quantize_static, shifted": partial(k.quantize_static, x, one, zero, smooth, **shift),
        "gelu_quantize, static, shifted": partial(
            k.gelu_quantize, x, smooth, scale=one, zero_point=zero, **shift
        ),
        "gelu_quantize, asymmetric": partial(k.gelu_quantize, x, asymmetric=True),
        "adaln_quantize, asymmetric, with values": partial(
            k.adaln_quantize, x, modulation, modulation, smooth, asymmetric=True, values_dtype=x.dtype
        ),
        "adaln_quantize, static, shifted": partial(
            k.adaln_quantize, x, modulation, modulation, smooth, scale=one, zero_point=zero, **shift
        ),
    }  # fmt: skip


def _gemms(device: torch.device, shape: Shape) -> Calls:
    q = torch.ones(shape.tokens, shape.inputs, dtype=torch.int8, device=device)
    step, one = torch.ones(shape.tokens, device=device), torch.ones(1, device=device)
    zero, zeros = (torch.zeros(n, dtype=torch.int32, device=device) for n in (1, shape.tokens))
    table = torch.ones(GROUPS, shape.outputs, device=device)
    stream = torch.ones(shape.tokens, shape.outputs, device=device)
    branch: dict[str, Any] = {
        "lora_x": torch.ones(shape.tokens, RANK, dtype=torch.bfloat16, device=device),
        "lora_up": torch.ones(shape.outputs, RANK, dtype=torch.bfloat16, device=device),
        "bias_index": _index(device, shape),
    }
    head_scales: Any = (torch.ones(shape.heads, device=device),) * 3
    found: Calls = {}
    for name, layer in _layers(device, shape).items():
        sums = layer.weight_sum()
        asymmetric: dict[str, Any] = {"zero_point": zeros, "weight_sum": sums}
        found[f"gemm_{name}, asymmetric, grouped, low rank"] = partial(
            _plain(name, layer), q, step, table, **asymmetric, **branch, out_dtype=torch.float16
        )
        found[f"gemm_residual, {name}, ungated, low rank"] = partial(
            k.gemm_residual, q, layer, step, table, residual=stream, **branch
        )
        found[f"gemm_gelu_quantize, {name}, smoothed"] = partial(
            k.gemm_gelu_quantize, q, layer, step, out_scale=one, out_zero_point=zero,
            out_smooth_inv=torch.ones(shape.outputs, device=device),
        )  # fmt: skip
        found[f"gemm_qkv_quantize, {name}, a scale a head"] = partial(
            k.gemm_qkv_quantize, q, (layer,) * 3, step, (table,) * 3, batch=shape.images, heads=shape.heads,
            head_scales=head_scales, v_zero_point=torch.zeros(shape.heads, dtype=torch.int32, device=device),
            bias_index=branch["bias_index"],
        )  # fmt: skip
        found[f"gemm_many, {name}, grouped"] = partial(
            k.gemm_many, q, (layer,) * 2, step, (table,) * 2, bias_index=branch["bias_index"]
        )
    return found


def _layers(device: torch.device, shape: Shape) -> dict[str, Any]:
    weight = torch.ones(shape.outputs, shape.inputs, device=device)
    return {
        "w8a8": k.quantize_weight_w8(weight),
        "w4a8": k.quantize_weight_w4p(weight, GROUP_SIZE).arranged(),
        "w4a8_per_group": k.quantize_weight_w4g(weight, GROUP_SIZE).arranged(),
    }


def _plain(name: str, layer: Any) -> Callable[..., Any]:
    """A plain GEMM of a layer: codes, steps and bias, then its stages."""
    op: Any = getattr(k, f"gemm_{name}")
    groups = {
        "w8a8": lambda: (layer.scale,),
        "w4a8": lambda: (layer.group_scale, layer.group_offset, layer.scale),
        "w4a8_per_group": lambda: (layer.scale, layer.weight_zero),
    }[name]()
    codes = layer.qweight if name == "w8a8" else layer.packed
    return lambda q, step, bias, **stages: op(q, codes, step, *groups, bias, **stages)


def _attention(device: torch.device, shape: Shape) -> Calls:
    tokens = shape.tokens // shape.images
    size = (shape.images, shape.heads, tokens, shape.head_dim)
    q, key, values = (torch.ones(size, dtype=torch.int8, device=device) for _ in "qkv")
    of_heads = torch.ones(shape.heads, device=device)
    of_tokens = torch.ones(size[:3], device=device)
    out: dict[str, Any] = {
        "out_scale": of_heads[:1].clone(),
        "out_zero_point": torch.zeros(1, dtype=torch.int32, device=device),
    }
    mask = torch.ones(shape.images, tokens, dtype=torch.bool, device=device)
    step: dict[str, Any] = {"softmax_scale": 0.125}
    half: dict[str, Any] = step | {"out_dtype": torch.float16}
    inside = values.transpose(2, 3).contiguous().transpose(2, 3)
    x = torch.ones(shape.images, tokens, shape.heads, shape.head_dim, device=device)
    angles = torch.ones(shape.images, tokens, shape.head_dim, device=device)
    wide = torch.ones(shape.heads * shape.head_dim, device=device)
    return {
        "attention_qk_int8_pv_int8, a scale a head, codes": partial(
            k.attention_qk_int8_pv_int8, q, key, inside, of_heads, of_heads + 1, of_heads + 2, **step, **out
        ),
        "attention_qk_int8_pv_int8, a scale a token, masked, strict": partial(
            k.attention_qk_int8_pv_int8, q, key, values, of_tokens, of_tokens + 1, of_heads,
            v_zero_point=torch.zeros(shape.heads, dtype=torch.int32, device=device), key_mask=mask, strict=True, **half,
        ),
        "attention_qk_int8_pv_bf16, a scale a token, masked": partial(
            k.attention_qk_int8_pv_bf16, q, key, values.bfloat16(), of_tokens, of_tokens + 1, key_mask=mask, **half
        ),
        "attention_qk_int8_pv_bf16, a scale a head, strict, codes": partial(
            k.attention_qk_int8_pv_bf16, q, key, values.bfloat16(), of_heads, of_heads + 1, strict=True, **step, **out
        ),
        "quantize_heads, one norm, halves, given scales": partial(
            k.quantize_heads, x, wide, angles, angles + 1, interleaved=False, scale=of_heads
        ),
        "quantize_heads, shifted": partial(
            k.quantize_heads, x, shift=torch.ones(shape.images, shape.heads, shape.head_dim, device=device)
        ),
    }  # fmt: skip


def _index(device: torch.device, shape: Shape) -> torch.Tensor:
    """The timestep group of each image."""
    return torch.zeros(shape.images, dtype=torch.int64, device=device)
