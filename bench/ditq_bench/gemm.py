"""The quantized linears against torch's own, at one shape: quantization included, and apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import ditq_kernels as k
from ditq_bench.ceilings import Ceilings
from ditq_bench.measure import Candidate, Row, measure, relative_error
from ditq_bench.others import OTHERS, fault, linear_call
from ditq_bench.shapes import GemmShape
from ditq_runtime.cli.output import say

BASELINE = "torch fp32 linear"
GROUP_SIZE = 64
# relative Frobenius errors: three fp32 roundings in an epilogue; K of them in an fp32 sum; bf16 keeps 8 bits,
# so operands and result round by 2**-9 each, and a sum of such products by no more than their size
EPILOGUE_ERROR, SUM_ERROR, BF16_ERROR = 1e-6, 1e-4, 3 * 2**-8
ROUNDED_RESULT = {torch.float32: 0.0, torch.bfloat16: 2**-8}


@dataclass(frozen=True)
class Operands:
    """One linear in every form that a candidate takes. x [T, K] and out are bf16 on CUDA, fp32 on a CPU."""

    shape: GemmShape
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    w8: Any
    w4: Any
    q: torch.Tensor
    scale: torch.Tensor

    @property
    def truth(self) -> torch.Tensor:
        """fp64 [T, N] of the float operands."""
        return self.x.double() @ self.weight.double().t() + self.bias.double()

    def quantized_truth(self, weight: torch.Tensor) -> torch.Tensor:
        """fp64 [T, N] of the quantized activations and a dequantized weight."""
        real = self.q.double() * self.scale.double()[:, None]
        return real @ weight.double().t() + self.bias.double()


def bench_gemm(
    shape: GemmShape,
    device: torch.device,
    budget: float = 20.0,
    ceilings: Ceilings | None = None,
    against: tuple[str, ...] = ("int_mm", "int_mm+dequant"),
) -> list[Row]:
    """Time W8A8 and W4A8 linears and their baselines at a shape.

    Args:
        shape: the linear.
        device: where.
        budget: seconds for timing all candidates.
        ceilings: of this device; rows then say how near the roof they are.
        against: names in BASELINES and `others.OTHERS`, beside fp32 and bf16.

    Raises:
        RuntimeError: a result is wrong; no time is reported for a wrong answer.
    """
    return measure(candidates(shape, device, against), shape.operations, device, budget, ceilings)


def candidates(shape: GemmShape, device: torch.device, against: tuple[str, ...]) -> list[Candidate]:
    """Torch in fp32 and bf16, baselines in BASELINES, and ours."""
    operands = _operands(shape, device)
    others = [BASELINES[name](operands) for name in against if name in BASELINES]
    libraries = [_library(operands, name) for name in against if name in OTHERS]
    found = [one for one in libraries if one is not None]
    return [*_floats(operands), *others, *found, *_ours(operands)]


def _library(o: Operands, name: str) -> Candidate | None:
    """Another library's linear; None where it has none, or fails, which is said."""
    other = OTHERS[name]
    if other.linear is None:
        return None

    def check(y: Any) -> float:
        return relative_error(y.detach(), o.truth)

    try:
        run = linear_call(name, o.weight, o.bias, o.x)
        reason = fault(run, check, other.tolerance)
    except Exception as failed:  # somebody else's code, which may raise anything
        reason = f"{type(failed).__name__}: {failed}"
    if reason:
        say(f"{name} at {o.shape.name} gets no row: {reason}")
        return None
    return Candidate(other.name, run, check, other.tolerance, "int8", _bytes(o, 2))


def _operands(shape: GemmShape, device: torch.device) -> Operands:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.tokens, shape.inputs, generator=generator).to(device)
    weight = torch.randn(shape.outputs, shape.inputs, generator=generator) / shape.inputs**0.5
    weight, bias = weight.to(device), torch.randn(shape.outputs, generator=generator).to(device)
    if device.type == "cuda":
        x = x.bfloat16()
    q, scale = k.quantize_per_token(x)
    w8, w4 = k.quantize_weight_w8(weight), k.quantize_weight_w4p(weight, GROUP_SIZE)
    return Operands(shape, x, weight, bias, w8, w4, q, scale)


def _floats(o: Operands) -> list[Candidate]:
    linear = torch.nn.functional.linear
    x = o.x.float()
    half = (o.x.bfloat16(), o.weight.bfloat16(), o.bias.bfloat16())

    def check(y: Any) -> float:
        return relative_error(y, o.truth)

    return [
        Candidate(
            BASELINE, lambda: linear(x, o.weight, o.bias), check, SUM_ERROR, "fp32", _bytes(o, 4)
        ),
        Candidate(
            "torch bf16 linear", lambda: linear(*half), check, BF16_ERROR, "bf16", _bytes(o, 2)
        ),
    ]


def _compiled(o: Operands) -> Candidate:
    half = (o.x.bfloat16(), o.weight.bfloat16(), o.bias.bfloat16())
    linear = torch.compile(torch.nn.functional.linear, dynamic=False)
    return Candidate(
        "torch.compile bf16 linear", lambda: linear(*half),
        lambda y: relative_error(y, o.truth), BF16_ERROR, "bf16", _bytes(o, 2),
    )  # fmt: skip


def _int_mm(o: Operands) -> Candidate:
    transposed = o.w8.qweight.t()

    def check(y: Any) -> float:
        return relative_error(y, o.q.double() @ transposed.double())

    s = o.shape
    moved = s.tokens * s.inputs + s.outputs * s.inputs + 4 * s.tokens * s.outputs
    return Candidate(
        "torch._int_mm", lambda: torch._int_mm(o.q, transposed), check, 0.0, "int8", moved
    )


def _int_mm_dequantized(o: Operands) -> Candidate:
    transposed = o.w8.qweight.t()

    def run() -> torch.Tensor:
        total = torch._int_mm(o.q, transposed)
        return (total * o.scale[:, None] * o.w8.scale + o.bias).to(o.x.dtype)

    return _integer("torch._int_mm + dequantize", o, run, o.w8.dequantize())


def _torchao_int8(o: Operands) -> Candidate:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    # int8 steps of both operands, each uniform within half a step of about 1/30 standard deviations
    return _torchao(
        o, "torchao int8 dynamic", Int8DynamicActivationInt8WeightConfig(), 0.03, "int8"
    )


def _torchao_fp8(o: Operands) -> Candidate:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

    # e4m3 keeps 4 bits of each operand: errors up to 2**-4 of it, uniform, so 2**-4 / sqrt(3) each; and sqrt(2) of both
    return _torchao(
        o, "torchao fp8 dynamic", Float8DynamicActivationFloat8WeightConfig(), 0.055, "int8"
    )


def _torchao(o: Operands, name: str, config: Any, tolerance: float, kind: str) -> Candidate:
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(
        o.shape.inputs, o.shape.outputs, device=o.x.device, dtype=torch.bfloat16
    )
    layer.weight.data.copy_(o.weight)
    layer.bias.data.copy_(o.bias)
    quantize_(layer, config)
    compiled = torch.compile(layer, dynamic=False)
    x = o.x.bfloat16()
    return Candidate(
        name, lambda: compiled(x),
        lambda y: relative_error(y.detach(), o.truth), tolerance, kind, _bytes(o, 2),
    )  # fmt: skip


BASELINES: dict[str, Callable[[Operands], Candidate]] = {
    "compiled": _compiled,
    "int_mm": _int_mm,
    "int_mm+dequant": _int_mm_dequantized,
    "torchao": _torchao_int8,
    "torchao-fp8": _torchao_fp8,
}


def _ours(o: Operands) -> list[Candidate]:
    out_dtype = o.x.dtype

    def w8a8(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return k.gemm_w8a8(q, o.w8.qweight, scale, o.w8.scale, o.bias, out_dtype=out_dtype)

    def w4a8(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        w4 = o.w4
        return k.gemm_w4a8(
            q,
            w4.packed,
            scale,
            w4.group_scale,
            w4.group_offset,
            w4.scale,
            o.bias,
            out_dtype=out_dtype,
        )

    w4g = k.quantize_weight_w4g(o.weight, GROUP_SIZE)

    def per_group() -> torch.Tensor:
        group = (w4g.scale, w4g.weight_zero)
        return k.gemm_w4a8_per_group(o.q, w4g.packed, o.scale, *group, o.bias, out_dtype=out_dtype)

    shift = torch.full((1, o.shape.inputs), 0.125, device=o.x.device)

    def quantize_site() -> tuple[torch.Tensor, ...]:
        return k.quantize_per_token(o.x, group_shift=shift, asymmetric=True)

    site = Candidate(
        "ditq quantize per token, shifted and asymmetric", quantize_site,
        lambda made: _rounding(o, made[0], made[1], made[2], 0.125), 1 + 1e-5, "",
        o.x.numel() * (o.x.element_size() + 1),
    )  # fmt: skip
    quantize = Candidate(
        "ditq quantize per token", lambda: k.quantize_per_token(o.x), lambda pair: _rounding(o, *pair),
        0.5 + 1e-5, "", o.x.numel() * (o.x.element_size() + 1),
    )  # fmt: skip
    parts = [k.W8(*one) for one in zip(o.w8.qweight.chunk(3), o.w8.scale.chunk(3), strict=True)]
    biases = o.bias.chunk(3)

    def three() -> tuple[torch.Tensor, ...]:
        return k.gemm_many(o.q, parts, o.scale, biases, out_dtype=out_dtype)

    w8, w4 = o.w8.dequantize(), o.w4.dequantize()
    return [
        quantize,
        site,
        _integer("ditq W8A8", o, lambda: w8a8(*k.quantize_per_token(o.x)), w8, quantize.num_bytes),
        _integer("ditq W8A8, GEMM alone", o, lambda: w8a8(o.q, o.scale), w8),
        _integer(
            "ditq W4A8", o, lambda: w4a8(*k.quantize_per_token(o.x)), w4, quantize.num_bytes, bits=4
        ),
        _integer("ditq W4A8, GEMM alone", o, lambda: w4a8(o.q, o.scale), w4, bits=4),
        _integer(
            "ditq W4A8 per group, GEMM alone",
            o,
            per_group,
            w4g.dequantize(),
            bits=4,
            error=SUM_ERROR,
        ),
    ]


def _integer(
    name: str,
    o: Operands,
    run: Callable[[], Any],
    weight: torch.Tensor,
    extra_bytes: int = 0,
    bits: int = 8,
    error: float = EPILOGUE_ERROR,
) -> Candidate:
    s, tolerance = o.shape, error + ROUNDED_RESULT[o.x.dtype]
    moved = s.tokens * s.inputs + s.outputs * s.inputs * bits // 8
    moved += s.tokens * s.outputs * o.x.element_size() + extra_bytes

    def check(y: Any) -> float:
        whole = torch.cat(y, dim=1) if isinstance(y, tuple) else y
        return relative_error(whole, o.quantized_truth(weight))

    return Candidate(name, run, check, tolerance, "int8", moved)


def _rounding(
    o: Operands, q: torch.Tensor, scale: torch.Tensor, zero_point: Any = 0, shift: float = 0.0
) -> float:
    """Largest distance from a code to its value, in steps; half a step more where a zero point clips an end."""
    real = (o.x.double() - shift) / scale.double()[:, None]
    zero = zero_point[:, None] if isinstance(zero_point, torch.Tensor) else zero_point
    return float((real + zero - q).abs().max())


def _bytes(o: Operands, size: int) -> int:
    s = o.shape
    return size * (s.tokens * s.inputs + s.outputs * s.inputs + s.tokens * s.outputs)
