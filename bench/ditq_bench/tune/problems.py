"""A call of every kernel that has a launch table, at a bucket's shape: `PROBLEMS[op](bucket, device)(launch)`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

import ditq_kernels as k
from ditq_bench.tune.space import Bucket

Call = Callable[[Any], Any]
GROUP_SIZE, RANK = 64, 32
HALF = torch.bfloat16


def launch_of(op: str) -> Callable[..., Any]:
    """The launch of a kernel's module."""
    return importlib.import_module(f"ditq_kernels._triton.{op}").launch


def _rows(bucket: Bucket, device: torch.device) -> Call:
    x = torch.randn(bucket.num_tokens, bucket.in_features, device=device).to(HALF)
    launch = launch_of(bucket.op)
    if bucket.op == "quantize_per_token":
        return lambda config: launch(x, None, config=config)
    scale, zero = _quantizer(device)
    return lambda config: launch(x, scale, zero, None, config=config)


def _adaln(bucket: Bucket, device: torch.device) -> Call:
    x = torch.randn(bucket.num_tokens, bucket.in_features, device=device).to(HALF)
    multiplier, shift = torch.randn(2, 1, bucket.in_features, device=device)
    tail = (1e-6, None, None, None, *_quantizer(device), None)
    return lambda config: launch_of("adaln_quantize")(x, multiplier, shift, *tail, config=config)[0]


def _expand(bucket: Bucket, device: torch.device) -> Call:
    w4 = _w4p(bucket, device)
    parts = (w4.packed, w4.group_scale, w4.group_offset)
    return lambda config: launch_of("w4_expand")(*parts, config=config)


def _gemm(bucket: Bucket, device: torch.device) -> Call:
    q, scale = _activations(bucket, device)
    tail = (_bias(bucket, device), None, None, HALF)
    launch = launch_of(bucket.op)
    if bucket.op == "gemm_w8a8":
        w8 = k.quantize_weight_w8(_weight(bucket, device))
        return lambda config: launch(q, w8.qweight, scale, w8.scale, *tail, config=config)
    w4 = _w4p(bucket, device)
    parts = (w4.packed, scale, w4.group_scale, w4.group_offset, w4.scale)
    return lambda config: launch(q, *parts, *tail, config=config)


def unswapped(bucket: Bucket, device: torch.device) -> Call:
    """W4A8 with the activations first; no op runs it."""
    q, scale = _activations(bucket, device)
    w4 = _w4p(bucket, device)
    parts = (w4.packed, scale, w4.group_scale, w4.group_offset, w4.scale)
    tail = (_bias(bucket, device), HALF)
    return lambda config: launch_of("gemm_w4a8_unswapped")(q, *parts, *tail, config=config)


def _gemm_epilogue(bucket: Bucket, device: torch.device) -> Call:
    """With a gated residual, as fc2 and the attention's projection."""
    q, scale = _activations(bucket, device)
    parts: tuple[Any, ...]
    if bucket.op.startswith("gemm_w8a8"):
        w8 = k.quantize_weight_w8(_weight(bucket, device))
        parts, weight_scale = (w8.qweight, None, None), w8.scale
    elif bucket.op.startswith("gemm_w4a8_per_group"):
        w4g = k.quantize_weight_w4g(_weight(bucket, device), GROUP_SIZE)
        parts, weight_scale = (w4g.packed, None, w4g.weight_zero), w4g.scale
    else:
        w4 = _w4p(bucket, device)
        parts, weight_scale = (w4.packed, w4.group_scale, w4.group_offset), w4.scale
    stream = torch.randn(bucket.num_tokens, bucket.out_features, device=device).to(HALF)
    gate = torch.randn(1, bucket.out_features, device=device)
    tail = (scale, weight_scale, _bias(bucket, device), None, None, None, None, None)
    launch = launch_of("gemm_residual")
    return lambda config: launch(q, *parts, stream, gate, *tail, config=config)


def _per_group(bucket: Bucket, device: torch.device) -> Call:
    """Symmetric tokens."""
    q, scale = _activations(bucket, device)
    w4g = k.quantize_weight_w4g(_weight(bucket, device), GROUP_SIZE)
    tail = (_bias(bucket, device), None, None, HALF)
    launch = launch_of("gemm_w4a8_per_group")
    return lambda config: launch(
        q, w4g.packed, scale, w4g.scale, w4g.weight_zero, *tail, config=config
    )


def _weight_only(bucket: Bucket, device: torch.device) -> Call:
    x = torch.randn(bucket.num_tokens, bucket.in_features, device=device)
    tail = (_bias(bucket, device), torch.float32)
    launch = launch_of(bucket.op)
    if bucket.op == "linear_w8":
        w8 = k.quantize_weight_w8(_weight(bucket, device))
        return lambda config: launch(x, w8.qweight, w8.scale, *tail, config=config)
    w4 = _w4p(bucket, device)
    parts = (w4.packed, w4.group_scale, w4.group_offset, w4.scale)
    return lambda config: launch(x, *parts, *tail, config=config)


def _lora_down(bucket: Bucket, device: torch.device) -> Call:
    q, scale = _activations(bucket, device)
    down = torch.randn(RANK, bucket.in_features, device=device).to(HALF)
    return lambda config: launch_of("lora_down")(q, down, scale, None, config=config)


def _attention(bucket: Bucket, device: torch.device) -> Call:
    size = (1, bucket.heads, bucket.num_tokens, bucket.in_features)
    q, key, v = (torch.randint(-127, 128, size, dtype=torch.int8, device=device) for _ in range(3))
    scales = torch.full((2, *size[:3]), 1 / 74, device=device)
    tail = (bucket.in_features**-0.5, None, HALF)
    launch = launch_of(bucket.op)
    if bucket.op == "attention_qk_int8_pv_bf16":
        half = v.to(HALF)
        return lambda config: launch(q, key, half, *scales, *tail, config=config)
    v_scale = torch.full((1,), 1 / 74, device=device)
    return lambda config: launch(q, key, v, *scales, v_scale, None, *tail, config=config)


def _activations(bucket: Bucket, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and a step for each token."""
    return k.quantize_per_token(torch.randn(bucket.num_tokens, bucket.in_features, device=device))


def _weight(bucket: Bucket, device: torch.device) -> torch.Tensor:
    return torch.randn(bucket.out_features, bucket.in_features, device=device)


def _w4p(bucket: Bucket, device: torch.device) -> k.W4P:
    return k.quantize_weight_w4p(_weight(bucket, device), GROUP_SIZE)


def _bias(bucket: Bucket, device: torch.device) -> torch.Tensor:
    return torch.randn(bucket.out_features, device=device)


def _quantizer(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """One step and zero point."""
    return torch.full((1,), 0.03, device=device), torch.zeros(1, device=device).int()


PROBLEMS: dict[str, Callable[[Bucket, torch.device], Call]] = {
    "quantize_per_token": _rows,
    "quantize_static": _rows,
    "adaln_quantize": _adaln,
    "w4_expand": _expand,
    "gemm_w8a8": _gemm,
    "gemm_w4a8": _gemm,
    "gemm_w8a8_epilogue": _gemm_epilogue,
    "gemm_w4a8_epilogue": _gemm_epilogue,
    "gemm_w4a8_per_group": _per_group,
    "gemm_w4a8_per_group_epilogue": _gemm_epilogue,
    "linear_w8": _weight_only,
    "linear_w4": _weight_only,
    "lora_down": _lora_down,
    "attention_qk_int8_pv_int8": _attention,
    "attention_qk_int8_pv_bf16": _attention,
}
