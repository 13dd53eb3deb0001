"""Every kernel once at a small, off-tile shape, for compute-sanitizer: `python -m ditq_bench.gpu_run.small`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

import ditq_kernels as k
from ditq_bench.gpu_run.place import Place
from ditq_bench.tune.problems import GROUP_SIZE, PROBLEMS, launch_of, unswapped

TOKENS, INPUTS, OUTPUTS, HEADS, HEAD_DIM = 33, 128, 40, 5, 72
VARIANTS: dict[str, dict[str, Any]] = {
    "gemm_w8a8, split": {"split_k": 2},
    "gemm_w4a8, split": {"split_k": 2},
    "gemm_w8a8, persistent": {"split_k": 1, "programs_per_sm": 1},
    "gemm_w8a8, persistent, two loops": {"split_k": 1, "programs_per_sm": 1, "flatten": False},
    "gemm_w8a8_epilogue, whole": {"split_k": 1, "parts": 1},
    "gemm_w8a8_epilogue, in parts": {"split_k": 1, "parts": 4},
    "gemm_w8a8, tma": {"split_k": 1, "loads": "tma"},
    "gemm_w8a8, tma persistent": {"split_k": 1, "loads": "tma", "programs_per_sm": 1},
}


def cases(place: Place) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(op, a call of its kernel): every op of `backend.TRITON_OPS`, of all weights; every launch table and variant."""
    for op, problem in PROBLEMS.items():
        bucket = place.bucket(
            op, TOKENS, HEAD_DIM if op.startswith("attention") else INPUTS, OUTPUTS
        )
        yield op, functools.partial(_table_op, problem, bucket, place.device)
    for op, call in WITHOUT_TABLE.items():
        yield op, functools.partial(call, place.device)
    bucket = place.bucket("gemm_w4a8", TOKENS, INPUTS, OUTPUTS)
    yield "gemm_w4a8_unswapped", functools.partial(_table_op, unswapped, bucket, place.device)
    for name, fields in VARIANTS.items():
        if "tma" in name and not place.hopper:
            continue
        op = name.partition(",")[0]
        bucket = place.bucket(op, TOKENS, 2 * INPUTS, OUTPUTS)
        other = dataclasses.replace(bucket, default=dataclasses.replace(bucket.default, **fields))
        yield name, functools.partial(_table_op, PROBLEMS[op], other, place.device)


def _table_op(problem: Any, bucket: Any, device: torch.device) -> Any:
    return problem(bucket, device)(bucket.default)


def _quantize_static_heads(device: torch.device) -> Any:
    x = torch.randn(TOKENS, HEADS * HEAD_DIM, device=device).bfloat16()
    return launch_of("quantize_static")(x, torch.full((HEADS,), 0.03, device=device), None, None)


def _quantize_heads(device: torch.device) -> Any:
    x = torch.randn(1, TOKENS, HEADS, HEAD_DIM, device=device).bfloat16()
    table = torch.randn(TOKENS, HEAD_DIM // 2, device=device)
    weight = torch.randn(HEADS * HEAD_DIM, device=device)
    return launch_of("quantize_heads")(x, weight, 1e-6, table, table, True, None, None)


def _gelu_quantize(device: torch.device) -> Any:
    x = torch.randn(TOKENS, INPUTS, device=device).bfloat16()
    return launch_of("gelu_quantize")(x, None, *_quantizer(device))[0]


def _gemm_residual(weights: str, device: torch.device) -> Any:
    q, scale, parts, weight_scale = _operands(weights, device)
    stream = torch.randn(TOKENS, OUTPUTS, device=device).bfloat16()
    tail = (scale, weight_scale, *[None] * 6)
    return launch_of("gemm_residual")(q, *parts, stream, None, *tail)


def _gemm_gelu_quantize(weights: str, device: torch.device) -> Any:
    q, scale, parts, weight_scale = _operands(weights, device)
    tail = (*_quantizer(device), None, scale, weight_scale, *[None] * 6)
    return launch_of("gemm_gelu_quantize")(q, *parts, *tail)


def _gemm_qkv_quantize(weights: str, device: torch.device) -> Any:
    q, scale, parts, weight_scale = _operands(weights, device)
    steps = [torch.full((1,), 0.1, device=device)] * 3
    three = ([] if part is None else [part] * 3 for part in parts)
    return launch_of("gemm_qkv_quantize")(
        q, *three, steps, None, 3, HEADS, scale, [weight_scale] * 3, [], None, [], None
    )[:2]  # values are written with padding between images, which stays undefined


def _gemm_many(weights: str, device: torch.device) -> Any:
    q, scale, parts, weight_scale = _operands(weights, device)
    three = ([] if part is None else [part] * 3 for part in parts)
    return tuple(
        launch_of("gemm_many")(
            q, *three, scale, [weight_scale] * 3, [], None, [], None, torch.bfloat16
        )
    )


def _operands(weights: str, device: torch.device) -> tuple[Any, ...]:
    """Codes and scales of the activations; the three parts of the weights, and their scales."""
    q, scale = k.quantize_per_token(torch.randn(TOKENS, INPUTS, device=device))
    floats = torch.randn(OUTPUTS, INPUTS, device=device)
    if weights == "w8":
        w8 = k.quantize_weight_w8(floats)
        return q, scale, (w8.qweight, None, None), w8.scale
    if weights == "w4g":
        w4g = k.quantize_weight_w4g(floats, GROUP_SIZE)
        return q, scale, (w4g.packed, None, w4g.weight_zero), w4g.scale
    w4p = k.quantize_weight_w4p(floats, GROUP_SIZE)
    return q, scale, (w4p.packed, w4p.group_scale, w4p.group_offset), w4p.scale


def _quantizer(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1,), 0.03, device=device), torch.zeros(1, device=device).int()


FUSED = {
    "gemm_residual": _gemm_residual,
    "gemm_gelu_quantize": _gemm_gelu_quantize,
    "gemm_qkv_quantize": _gemm_qkv_quantize,
    "gemm_many": _gemm_many,
}
WITHOUT_TABLE: dict[str, Callable[[torch.device], Any]] = {
    "gelu_quantize": _gelu_quantize,
    "quantize_heads": _quantize_heads,
    **{op: functools.partial(call, "w8") for op, call in FUSED.items()},
    **{
        f"{op}, {weights}": functools.partial(call, weights)
        for op, call in FUSED.items()
        for weights in ("w4p", "w4g")
    },
}


def main() -> None:
    """Launch each kernel; prints their names. Exit code 1 if one fails or an output is not finite; all are tried."""
    parser = argparse.ArgumentParser(description="launch every kernel once")
    parser.add_argument("--dry-run", action="store_true", help="interpreted on the CPU")
    dry_run = parser.parse_args().dry_run
    failed = []
    for name, call in cases(Place(torch.device("cpu" if dry_run else "cuda"), dry_run)):
        try:
            problem = _fault(call())
        except Exception as error:  # a kernel that fails must not hide the others
            problem = " ".join(str(error).split())[:200]
        print(name, problem)  # noqa: T201
        failed += [f"{name}: {problem}"] if problem else []
    if failed:
        raise SystemExit("; ".join(failed))


def _fault(out: Any) -> str:
    parts = out if isinstance(out, tuple) else (out,)
    return "" if all(bool(part.isfinite().all()) for part in parts) else "an output is not finite"


if __name__ == "__main__":
    main()
