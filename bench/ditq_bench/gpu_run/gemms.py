"""GEMMs of DiT-XL/2 at few and many tokens, plain and with stages: `python -m ditq_bench.gpu_run.gemms --out FILE`.

Each against cuBLAS in bf16 and `torch._int_mm`. Weights take turns, so that few tokens do not read theirs from a warm
L2 cache. A result is compared with fp64 before it is timed: a wrong one is written as such, and the rest goes on. A
line of JSON a row, as they come.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import ditq_kernels as k
from ditq_bench.gpu_run.stage import write_rows
from ditq_bench.timing import CALLS, time_in_turn

SHAPES = {  # inputs, outputs of DiT-XL/2
    "fc1": (1152, 4608), "fc2": (4608, 1152), "qkv": (1152, 3456), "out": (1152, 1152),
}  # fmt: skip
TOKENS = (512, 8192)
SMALL_SHAPES, SMALL_TOKENS = {"fc1": (128, 64)}, (32,)  # of a rehearsal
L2_BYTES = 128 * 2**20  # more than any: what takes turns must not fit
CHECKED_ROWS, BOUND = 16, 0.02  # of W8A8 and bf16 against fp64 of their own operands
Call = Callable[[int], torch.Tensor]  # of the number of the weights


def calls(
    tokens: int, inputs: int, outputs: int, device: torch.device, copies: int
) -> dict[str, tuple[Call, Any]]:
    """Name -> a call with the weights of a turn, and what its first rows must be with the first; None: unchecked."""
    x = torch.randn(tokens, inputs, device=device).bfloat16()
    floats = torch.randn(outputs, inputs, device=device) / inputs**0.5
    w8, w4 = k.quantize_weight_w8(floats), k.quantize_weight_w4p(floats, 64).arranged()
    bf16 = [floats.bfloat16() for _ in range(copies)]
    int8 = [w8.qweight.clone() for _ in range(copies)]
    int4 = [
        k.W4P(w4.packed.clone(), w4.group_scale, w4.group_offset, w4.scale) for _ in range(copies)
    ]
    eight = [k.W8(one, w8.scale) for one in int8]
    q, scale = k.quantize_per_token(x)
    stream, gate = (
        torch.randn(tokens, outputs, device=device).bfloat16(),
        torch.randn(1, outputs, device=device),
    )
    one, zero = (
        torch.full((1,), 0.02, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    half: dict[str, Any] = {"out_dtype": torch.bfloat16}
    rows = x[:CHECKED_ROWS].double()
    codes = q[:CHECKED_ROWS].double() * scale[:CHECKED_ROWS].double()[:, None]
    exact8, exact4 = codes @ w8.dequantize().double().t(), codes @ w4.dequantize().double().t()
    groups = (w4.group_scale, w4.group_offset, w4.scale)
    residual = stream[:CHECKED_ROWS].double() + gate.double() * exact8
    return {
        "cuBLAS bf16": (lambda i: torch.nn.functional.linear(x, bf16[i]), rows @ floats.double().t()),
        "torch._int_mm": (lambda i: torch._int_mm(q, int8[i].t()), q[:CHECKED_ROWS].double() @ w8.qweight.double().t()),
        "W8A8": (lambda i: k.gemm_w8a8(q, int8[i], scale, w8.scale, **half), exact8),
        "W8A8, gated residual": (
            lambda i: k.gemm_residual(q, eight[i], scale, residual=stream, gate=gate), residual,
        ),
        "W8A8, GELU codes": (
            lambda i: k.gemm_gelu_quantize(q, eight[i], scale, out_scale=one, out_zero_point=zero), None,
        ),
        "W4A8": (lambda i: k.gemm_w4a8(q, int4[i].packed, scale, *groups, **half), exact4),
        "quantize": (lambda i: k.quantize_per_token(x)[0], None),
    }  # fmt: skip


def rows_of(device: torch.device, rehearsal: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """What is written, most telling first: many tokens."""
    shapes, tokens_of = (SMALL_SHAPES, SMALL_TOKENS) if rehearsal else (SHAPES, TOKENS[::-1])
    end = time.perf_counter() + seconds
    for tokens, (name, (inputs, outputs)) in itertools.product(tokens_of, shapes.items()):
        copies = 2 if rehearsal else max(2, min(CALLS, L2_BYTES // (inputs * outputs) + 1))
        made = calls(tokens, inputs, outputs, device, copies)
        case = {"shape": name, "tokens": tokens, "inputs": inputs, "outputs": outputs}
        right: dict[str, Callable[[], object]] = {}
        for candidate, (call, expected) in made.items():
            wrong = _fault(call, None if rehearsal else expected)
            if wrong:
                yield case | {"candidate": candidate, "wrong": wrong}
                continue
            turns = itertools.cycle(range(copies))
            right[candidate] = partial(_in_turn, call, turns)
        left = max(0.0, end - time.perf_counter())
        budget = min(left, seconds / len(shapes) / len(tokens_of))
        for candidate, t in time_in_turn(
            right, device, budget=budget, rounds=30, graphs=True
        ).items():
            times = {"p20_us": 1e6 * t.p20, "median_us": 1e6 * t.median, "p80_us": 1e6 * t.p80}
            tops = 2e-12 * tokens * inputs * outputs / t.median
            yield case | {"candidate": candidate, **times, "tops": tops, "timed_by": t.how}


def _in_turn(call: Call, turns: Iterator[int]) -> torch.Tensor:
    return call(next(turns))


def _fault(call: Call, expected: torch.Tensor | None) -> str:
    """What is wrong with a result; empty if nothing is, or nothing is known."""
    try:
        y = call(0)[:CHECKED_ROWS].double()
    except Exception as error:  # the compiler has errors of many classes
        return " ".join(str(error).split())[:200]
    if expected is None:
        return ""
    off = float((y - expected).norm() / expected.norm())
    return "" if off < BOUND else f"relative error {off:.3g}"


def main() -> None:
    """Time them. Exit code 1 if a result was wrong."""
    write_rows("time the GEMMs of DiT-XL/2", rows_of, 45.0, ("wrong", "results are wrong"))


if __name__ == "__main__":
    main()
