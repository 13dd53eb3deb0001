"""A call of every public op at one shape, as a layer makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import ditq_kernels as k

GROUP_SIZE = 64


@dataclass(frozen=True)
class Shape:
    """Of all ops: tokens of several images, inputs and outputs of a linear, its heads.

    Attributes:
        images: of a batch.
        tokens: of all images.
        inputs: a multiple of 64.
        heads: of the attention.
        head_dim: outputs are heads of so many channels.
    """

    images: int
    tokens: int
    inputs: int
    heads: int
    head_dim: int

    @property
    def outputs(self) -> int:
        """Of a linear."""
        return self.heads * self.head_dim


ODD = Shape(images=3, tokens=33, inputs=192, heads=1, head_dim=72)  # no multiple of any tile


def calls(device: torch.device, shape: Shape = ODD) -> dict[str, Callable[[], Any]]:
    """Name -> a call; operands are made once."""
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(device) + 0.1

    def codes(*shape: int) -> torch.Tensor:
        made = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        return made.to(device)

    zero = torch.zeros(1, dtype=torch.int32, device=device)
    x, q = floats(shape.tokens, shape.inputs).bfloat16(), codes(shape.tokens, shape.inputs)
    weight = floats(shape.outputs, shape.inputs)
    layers = {
        "w8": k.quantize_weight_w8(weight),
        "w4p": k.quantize_weight_w4p(weight, GROUP_SIZE).arranged(),
        "w4g": k.quantize_weight_w4g(weight, GROUP_SIZE).arranged(),
    }
    found = _rows(shape, x, floats, zero) | _fused(shape, q, layers, floats, zero)
    return found | _gemms(shape, q, layers, floats) | _attention(shape, codes, floats)


def _rows(
    shape: Shape, x: torch.Tensor, floats: Any, zero: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    one, smooth_inv, shift = floats(1), floats(shape.inputs), floats(1, shape.inputs)
    multiplier, add = floats(shape.images, shape.inputs), floats(shape.images, shape.inputs)
    static = {"scale": one, "zero_point": zero}
    return {
        "quantize_per_token": lambda: k.quantize_per_token(x),
        "quantize_per_token, shifted, asymmetric": lambda: k.quantize_per_token(
            x, smooth_inv, group_shift=shift, asymmetric=True
        ),
        "quantize_static": lambda: k.quantize_static(x, one, zero),
        "gelu_quantize": lambda: k.gelu_quantize(x),
        "adaln_quantize": lambda: k.adaln_quantize(x, multiplier, add),
        "adaln_quantize, static": lambda: k.adaln_quantize(x, multiplier, add, **static),
    }


def _gemms(
    shape: Shape, q: torch.Tensor, layers: dict[str, Any], floats: Any
) -> dict[str, Callable[[], Any]]:
    step, bias = floats(shape.tokens), floats(shape.outputs)
    down = floats(16, shape.inputs).bfloat16()
    w8, w4, w4g = layers.values()
    groups = (w4.group_scale, w4.group_offset, w4.scale)
    file = k.quantize_weight_w4p(w4.dequantize(), GROUP_SIZE)  # as modulation layers hold theirs
    half: dict[str, Any] = {"out_dtype": torch.bfloat16}
    row = floats(shape.images, shape.inputs)
    return {
        "gemm_w8a8": lambda: k.gemm_w8a8(q, w8.qweight, step, w8.scale, bias, **half),
        "gemm_w4a8": lambda: k.gemm_w4a8(q, w4.packed, step, *groups, bias, **half),
        "gemm_w4a8_per_group": lambda: k.gemm_w4a8_per_group(
            q, w4g.packed, step, w4g.scale, w4g.weight_zero, bias, **half
        ),
        "lora_down": lambda: k.lora_down(q, down, step),
        "w4_expand": lambda: k.w4_expand(file.packed, file.group_scale, file.group_offset),
        "linear_w8": lambda: k.linear_w8(row, w8.qweight, w8.scale, bias),
        "linear_w4": lambda: k.linear_w4(
            row, file.packed, file.group_scale, file.group_offset, file.scale, bias
        ),
    }


def _fused(
    shape: Shape, q: torch.Tensor, layers: dict[str, Any], floats: Any, zero: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    one, bias = floats(1), floats(shape.outputs)
    stream = floats(shape.tokens, shape.outputs).bfloat16()
    gate = floats(shape.images, shape.outputs)
    out = {"out_scale": one + 1, "out_zero_point": zero + 1}
    steps = (floats(1), floats(1), floats(1))
    found: dict[str, Callable[[], Any]] = {}
    for name, layer in layers.items():
        static = {"zero_point": zero, "weight_sum": layer.weight_sum()}
        sums: dict[str, Any] = {
            "zero_point": zero,
            "weight_sums": tuple(layer.weight_sum() for _ in range(3)),
        }
        three: Any = tuple(
            type(layer)(*(part.clone() for part in vars(layer).values())) for _ in "qkv"
        )
        heads = {"batch": shape.images, "heads": shape.heads, "head_scales": steps, **sums}
        found[f"gemm_residual, {name}"] = partial(
            k.gemm_residual, q, layer, one, bias, residual=stream, gate=gate, **static
        )
        found[f"gemm_gelu_quantize, {name}"] = partial(
            k.gemm_gelu_quantize, q, layer, one, bias, **out, **static
        )
        found[f"gemm_qkv_quantize, {name}"] = partial(k.gemm_qkv_quantize, q, three, one, **heads)
        found[f"gemm_many, {name}"] = partial(
            k.gemm_many, q, three, one, (bias, bias + 1, bias + 2), **sums
        )
    return found


def _attention(shape: Shape, codes: Any, floats: Any) -> dict[str, Callable[[], Any]]:
    rows, head_dim = shape.tokens // shape.images, shape.head_dim
    query, key, values = (codes(shape.images, shape.heads, rows, head_dim) for _ in "qkv")
    steps, step = (floats(1), floats(1)), floats(1)
    half = values.bfloat16()
    heads, weight = floats(shape.images, rows, shape.heads, head_dim).bfloat16(), floats(head_dim)
    tables = [floats(rows, head_dim // 2) for _ in range(2)]
    options: dict[str, Any] = {"softmax_scale": 0.125, "out_dtype": torch.bfloat16}
    return {
        "quantize_heads": lambda: k.quantize_heads(heads, weight, *tables),
        "attention_qk_int8_pv_int8": lambda: k.attention_qk_int8_pv_int8(
            query, key, values, *steps, step, **options
        ),
        "attention_qk_int8_pv_bf16": lambda: k.attention_qk_int8_pv_bf16(
            query, key, half, *steps, **options
        ),
    }
