"""Quantized attention against torch's scaled_dot_product_attention, at one shape: quantization included, and apart."""

from __future__ import annotations

from typing import Any

import torch

import ditq_kernels as k
from ditq_bench.ceilings import Ceilings
from ditq_bench.measure import Candidate, Row, measure, relative_error
from ditq_bench.others import OTHERS, fault
from ditq_bench.shapes import AttentionShape
from ditq_runtime.cli.output import say

BASELINE = "torch fp32 attention"
# Against fp64 of the operands a candidate was given. fp32: sums over keys; bf16: operands, probabilities and result
# round by 2**-9; probabilities in 255 levels relative to the largest of their row
SUM_ERROR, BF16_ERROR, INT8_P_ERROR, BF16_P_ERROR = 1e-5, 2**-6, 1e-2, 2**-8
ROUNDED_RESULT = {torch.float32: 0.0, torch.bfloat16: 2**-8}


def bench_attention(
    shape: AttentionShape,
    device: torch.device,
    budget: float = 20.0,
    ceilings: Ceilings | None = None,
    against: tuple[str, ...] = (),
) -> list[Row]:
    """Time both quantized attentions, their baselines and libraries of `others.OTHERS` at a shape.

    Raises:
        RuntimeError: a result is wrong; no time is reported for a wrong answer.
    """
    generator = torch.Generator().manual_seed(0)
    size = (shape.sequences, shape.heads, shape.tokens, shape.head_dim)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, key, v = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(3))
    libraries = [_library(name, shape.name, q, key, v) for name in against if name in OTHERS]
    found = [one for one in libraries if one is not None]
    candidates = [*_floats(q, key, v), *found, *_ours(q, key, v)]
    return measure(candidates, shape.operations, device, budget, ceilings)


def _floats(q: torch.Tensor, key: torch.Tensor, v: torch.Tensor) -> list[Candidate]:
    def candidate(name: str, dtype: torch.dtype, tolerance: float, kind: str) -> Candidate:
        a, b, c = (part.to(dtype) for part in (q, key, v))
        return Candidate(
            name, lambda: torch.nn.functional.scaled_dot_product_attention(a, b, c),
            lambda y: _error(y, q, key, v), tolerance, kind, 4 * q.numel() * a.element_size(),
        )  # fmt: skip

    return [
        candidate(BASELINE, torch.float32, SUM_ERROR, "fp32"),
        candidate("torch bf16 attention", torch.bfloat16, BF16_ERROR, "bf16"),
    ]


def _library(
    name: str, shape: str, q: torch.Tensor, key: torch.Tensor, v: torch.Tensor
) -> Candidate | None:
    """Another library's attention; None where it has none, or fails, which is said."""
    other = OTHERS[name]
    if other.attention is None:
        return None

    def check(y: Any) -> float:
        return _error(y, q, key, v)

    try:
        run = other.attention(q.bfloat16(), key.bfloat16(), v.bfloat16())
        reason = fault(run, check, other.tolerance)
    except Exception as failed:  # somebody else's code, which may raise anything
        reason = f"{type(failed).__name__}: {failed}"
    if reason:
        say(f"{name} at {shape} gets no row: {reason}")
        return None
    return Candidate(other.name, run, check, other.tolerance, "int8", 8 * q.numel())


def _ours(q: torch.Tensor, key: torch.Tensor, v: torch.Tensor) -> list[Candidate]:
    softmax_scale, dtype = q.shape[-1] ** -0.5, q.dtype
    v_scale = (v.abs().max().float() / 127).reshape(1)
    half = v.bfloat16()

    def codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return k.quantize_heads(x.transpose(1, 2))

    def value_codes() -> torch.Tensor:
        return k.quantize_heads(v.transpose(1, 2), scale=v_scale.expand(v.shape[1]).contiguous())[0]

    rest = {"softmax_scale": softmax_scale, "out_dtype": dtype}

    def int8(qs: tuple, ks: tuple, vs: torch.Tensor, strict: bool = False) -> torch.Tensor:
        return k.attention_qk_int8_pv_int8(
            qs[0], ks[0], vs, qs[1], ks[1], v_scale, strict=strict, **rest
        )

    def bf16(qs: tuple, ks: tuple, strict: bool = False) -> torch.Tensor:
        return k.attention_qk_int8_pv_bf16(qs[0], ks[0], half, qs[1], ks[1], strict=strict, **rest)

    qs, ks, vs = codes(q), codes(key), value_codes()
    q_real, k_real = (c.float() * s[..., None] for c, s in (qs, ks))
    v_real = vs.float() * v_scale
    rounded = ROUNDED_RESULT[dtype]
    out = q.numel() * q.element_size()
    runs = (
        ("int8 PV", lambda: int8(codes(q), codes(key), value_codes()), v_real, INT8_P_ERROR, 6 * q.numel() + 3 * out),
        ("int8 PV, attention alone", lambda: int8(qs, ks, vs), v_real, INT8_P_ERROR, 3 * q.numel()),
        ("int8 PV, strict, alone", lambda: int8(qs, ks, vs, True), v_real, INT8_P_ERROR, 3 * q.numel()),
        ("bf16 PV", lambda: bf16(codes(q), codes(key)), half, BF16_P_ERROR, 6 * q.numel() + 2 * out),
        ("bf16 PV, attention alone", lambda: bf16(qs, ks), half, BF16_P_ERROR, 4 * q.numel()),
        ("bf16 PV, strict, alone", lambda: bf16(qs, ks, True), half, BF16_P_ERROR, 4 * q.numel()),
    )  # fmt: skip
    return [
        Candidate(
            f"ditq int8 QK, {name}", run, _against(q_real, k_real, values), tolerance + rounded, "int8",
            moved + out,
        )
        for name, run, values, tolerance, moved in runs
    ]  # fmt: skip


def _against(q: torch.Tensor, key: torch.Tensor, v: torch.Tensor) -> Any:
    return lambda y: _error(y, q, key, v)


def _error(y: Any, q: torch.Tensor, key: torch.Tensor, v: torch.Tensor) -> float:
    """Against fp64, in the first and the last head: a whole score matrix in fp64 would not fit."""
    errors = []
    for at in (0, -1):
        scores = q[at, at].double() @ key[at, at].double().t() * q.shape[-1] ** -0.5
        errors.append(relative_error(y[at, at], scores.softmax(-1) @ v[at, at].double()))
    return max(errors)
