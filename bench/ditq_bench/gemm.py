"""The quantized linears against torch's own, at one shape: quantization included, and apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import ditq_kernels as k
from ditq_bench.shapes import GemmShape
from ditq_bench.timing import Timing, time_in_turn

BASELINE = "torch fp32 linear"
GROUP_SIZE = 64


@dataclass(frozen=True)
class GemmRow:
    """One candidate at one shape.

    Attributes:
        candidate: what ran.
        timing: seconds per call.
        tops: 1e12 operations per second at the median.
        speedup: median of BASELINE / own median, same run.
        error: relative Frobenius error against fp64 on the operands it was given; None for the baselines.
    """

    candidate: str
    timing: Timing
    tops: float
    speedup: float
    error: float | None


def bench_gemm(shape: GemmShape, device: torch.device, budget: float = 20.0) -> list[GemmRow]:
    """Time W8A8 and W4A8 linears and their baselines at a shape.

    Raises:
        RuntimeError: a result is wrong; no time is reported for a wrong answer.
    """
    x, weight, bias = _inputs(shape, device)
    w8 = k.quantize_weight_w8(weight)
    w4 = k.quantize_weight_w4p(weight, GROUP_SIZE)
    q, scale = k.quantize_per_token(x)

    def w8a8(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return k.gemm_w8a8(q, w8.qweight, scale, w8.scale, bias)

    def w4a8(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return k.gemm_w4a8(q, w4.packed, scale, w4.group_scale, w4.group_offset, w4.scale, bias)

    errors = {
        "ditq W8A8": _check("W8A8", w8a8(q, scale), q, scale, w8.dequantize(), bias),
        "ditq W4A8": _check("W4A8", w4a8(q, scale), q, scale, w4.dequantize(), bias),
    }
    half_x, half_weight, half_bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    transposed = w8.qweight.t()
    candidates: dict[str, Callable[[], object]] = {
        BASELINE: lambda: torch.nn.functional.linear(x, weight, bias),
        "torch bf16 linear": lambda: torch.nn.functional.linear(half_x, half_weight, half_bias),
        "torch._int_mm": lambda: torch._int_mm(q, transposed),
        "ditq quantize per token": lambda: k.quantize_per_token(x),
        "ditq W8A8": lambda: w8a8(*k.quantize_per_token(x)),
        "ditq W8A8, GEMM alone": lambda: w8a8(q, scale),
        "ditq W4A8": lambda: w4a8(*k.quantize_per_token(x)),
    }
    timings = time_in_turn(candidates, device, budget=budget)
    base = timings[BASELINE].median
    return [
        GemmRow(name, t, shape.operations / t.median / 1e12, base / t.median, errors.get(name))
        for name, t in timings.items()
    ]


def _inputs(
    shape: GemmShape, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.tokens, shape.inputs, generator=generator)
    weight = torch.randn(shape.outputs, shape.inputs, generator=generator) / shape.inputs**0.5
    bias = torch.randn(shape.outputs, generator=generator)
    return x.to(device), weight.to(device), bias.to(device)


def _check(
    name: str,
    y: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> float:
    """Relative error against fp64; the epilogue's three fp32 roundings cost at most about 3 * 2^-24."""
    truth = (q.double() * scale.double()[:, None]) @ weight.double().t() + bias.double()
    error = float((y.double() - truth).norm() / truth.norm())
    if not error < 1e-6:
        raise RuntimeError(
            f"bench: {name} is wrong (relative error {error:.1e}); no time is reported"
        )
    return error
