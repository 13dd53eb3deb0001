"""Time launches on this GPU and write the best ones as its table."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import ditq_kernels as k
from ditq_bench.results import commit
from ditq_bench.timing import time_in_turn
from ditq_bench.tune.space import Bucket
from ditq_runtime.files import atomic_file


@dataclasses.dataclass(frozen=True)
class Timed:
    """One launch of a bucket: median seconds of a call, p20 and p80."""

    config: Any
    p20: float
    median: float
    p80: float


def time_launches(
    bucket: Bucket, configs: list[Any], device: torch.device, budget: float
) -> list[Timed]:
    """Check every launch against the default one, exactly, then time them in turn; the fastest first.

    Raises:
        RuntimeError: a launch gives another result than the default: integers are exact, so one is wrong.
    """
    run = PROBLEMS[bucket.op](bucket, device)
    expected = run(bucket.default)
    for config in configs:
        if not _equal(run(config), expected):
            raise RuntimeError(f"tune: {bucket.op} with {config} differs from {bucket.default}")
    candidates: dict[str, Callable[[], object]] = {
        str(index): functools.partial(run, config) for index, config in enumerate(configs)
    }
    timings = time_in_turn(candidates, device, rounds=30, budget=budget)
    timed = [
        Timed(config, t.p20, t.median, t.p80)
        for config, t in zip(configs, timings.values(), strict=True)
    ]
    return sorted(timed, key=lambda item: item.median)


def tune(
    plan: list[tuple[Bucket, list[Any]]], device: torch.device, budget: float
) -> Iterator[tuple[Bucket, list[Timed]]]:
    """Time bucket after bucket within a budget of seconds; what it does not reach keeps its default."""
    end = time.perf_counter() + budget
    for index, (bucket, configs) in enumerate(plan):
        left = end - time.perf_counter()
        if left <= 0:
            return
        yield bucket, time_launches(bucket, configs, device, left / (len(plan) - index))


def table_of(
    found: list[tuple[Bucket, list[Timed]]], architecture: str, device: str
) -> dict[str, Any]:
    """A launch table as in `tuned/`: per op, rows with their limits."""
    ops: dict[str, list[dict[str, int]]] = {}
    for bucket, timed in found:
        row = bucket.limits | dataclasses.asdict(timed[0].config)
        ops.setdefault(bucket.op, []).append(row)
    return {
        "architecture": architecture, "device": device, "triton": version("triton"),
        "provenance": f"timed with CUDA events by ditq tune, commit {commit()}", "ops": ops,
    }  # fmt: skip


def write_table(path: Path, table: dict[str, Any]) -> None:
    """Write a launch table atomically."""
    with atomic_file(path) as part:
        part.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _launch(op: str) -> Callable[..., Any]:
    return importlib.import_module(f"ditq_kernels._triton.{op}").launch


def _rows(bucket: Bucket, device: torch.device) -> Callable[[Any], Any]:
    x = torch.randn(bucket.num_tokens, bucket.in_features, device=device).bfloat16()
    if bucket.op == "quantize_per_token":
        return lambda config: _launch(bucket.op)(x, None, config=config)
    scale, zero = torch.full((1,), 0.03, device=device), torch.zeros(1, device=device).int()
    return lambda config: _launch(bucket.op)(x, scale, zero, None, config=config)


def _gemm(bucket: Bucket, device: torch.device) -> Callable[[Any], Any]:
    q, scale = k.quantize_per_token(
        torch.randn(bucket.num_tokens, bucket.in_features, device=device)
    )
    weight = torch.randn(bucket.out_features, bucket.in_features, device=device)
    bias = torch.randn(bucket.out_features, device=device)
    tail = (bias, None, None, torch.bfloat16)
    if bucket.op == "gemm_w8a8":
        w8 = k.quantize_weight_w8(weight)
        return lambda config: _launch(bucket.op)(
            q, w8.qweight, scale, w8.scale, *tail, config=config
        )
    w4 = k.quantize_weight_w4p(weight, 64)
    parts = (w4.packed, scale, w4.group_scale, w4.group_offset, w4.scale)
    return lambda config: _launch(bucket.op)(q, *parts, *tail, config=config)


def _attention(bucket: Bucket, device: torch.device) -> Callable[[Any], Any]:
    size = (1, bucket.heads, bucket.num_tokens, bucket.in_features)
    q, key, v = (torch.randint(-127, 128, size, dtype=torch.int8, device=device) for _ in range(3))
    scales = torch.full((2, *size[:3]), 1 / 74, device=device)
    softmax_scale = bucket.in_features**-0.5
    tail = (softmax_scale, None, torch.bfloat16)
    if bucket.op == "attention_qk_int8_pv_bf16":
        half = v.bfloat16()
        return lambda config: _launch(bucket.op)(q, key, half, *scales, *tail, config=config)
    v_scale = torch.full((1,), 1 / 74, device=device)
    return lambda config: _launch(bucket.op)(
        q, key, v, *scales, v_scale, None, *tail, config=config
    )


PROBLEMS: dict[str, Callable[[Bucket, torch.device], Callable[[Any], Any]]] = {
    "quantize_per_token": _rows,
    "quantize_static": _rows,
    "gemm_w8a8": _gemm,
    "gemm_w4a8": _gemm,
    "attention_qk_int8_pv_int8": _attention,
    "attention_qk_int8_pv_bf16": _attention,
}


def _equal(one: Any, other: Any) -> bool:
    """Exactly, but for sums of bf16 products, whose order depends on the tile."""
    if isinstance(one, tuple):
        return all(_equal(a, b) for a, b in zip(one, other, strict=True))
    if torch.equal(one, other):
        return True
    if not one.is_floating_point():
        return False
    difference = (one.double() - other.double()).norm() / other.double().norm()
    return bool(difference < 2**-8)
