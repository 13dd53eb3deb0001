"""Which launches are worth timing: all that fit, less those that spill or that the issue model rules out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ditq_bench.census.issue_model import MACHINES, predict
from ditq_kernels import tuning

SLACK = 1.5  # launches predicted this much slower than the best are dropped
WIDTHS, HEAD_DIMS = (1152, 4608, 15360), (72, 128)  # K of DiTs and of Flux's widest linear; D
MANY_TOKENS = {"attention": 1024, "": 8192}
ACCUMULATORS = (
    128  # fp32 or int32 sums a thread; twice as many registers leave nothing for operands
)
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One row of a launch table to fill.

    Attributes:
        op: whose table.
        limits: what the row is for: max_tokens, max_in_features, or neither.
        num_tokens: T it is timed at; keys for attention.
        in_features: K it is timed at; the head dimension for attention.
        default: the launch of the architecture's own table.
        out_features: N of a GEMM.
        heads: of both images, for attention.
    """

    op: str
    limits: dict[str, int]
    num_tokens: int
    in_features: int
    default: Any
    out_features: int = 4608  # fc1 of DiT-XL
    heads: int = 32  # one guided image of DiT-XL


def buckets(target: int, ops: Collection[str]) -> list[Bucket]:
    """One for each row that the architecture's launch table has for these ops."""
    found = []
    for table in tuning.tables_of_architecture(f"sm_{target}"):
        for op, rows in tuning.load_table(table)["ops"].items():
            for row in rows if op in ops else ():
                limits = {name: value for name, value in row.items() if name.startswith("max_")}
                kind = "attention" if op.startswith("attention") else ""
                sizes = HEAD_DIMS if kind else WIDTHS
                limit = limits.get("max_in_features", sizes[-1] if _row_wise(op) else sizes[0])
                inputs = max(size for size in sizes if size <= max(limit, sizes[0]))
                tokens = limits.get("max_tokens", MANY_TOKENS[kind])
                found.append(
                    Bucket(op, limits, tokens, inputs, _default(op, target, tokens, inputs))
                )
    return found


def launches(bucket: Bucket, target: int) -> list[Any]:
    """Launches that fit by arithmetic, the default first."""
    kind = type(bucket.default)
    fitting = [config for config in SPACES[kind](bucket) if _fits(config, target)]
    return [bucket.default, *(config for config in fitting if config != bucket.default)]


def prune(
    bucket: Bucket, target: int, advance: Callable[[], None] = lambda: None, slack: float = SLACK
) -> list[tuple[Any, float]]:
    """(launch, predicted seconds), the best first; the default is always kept.

    Compiles every launch, one to two seconds each, and drops those that spill, need more shared memory than the
    architecture has, or are predicted `slack` times slower than the best.
    """
    predicted = {}
    for config in launches(bucket, target):
        tokens = bucket.num_tokens if bucket.op.startswith("attention") else 8192
        census = _census(bucket.op, target, tokens, bucket.in_features, config)
        advance()
        sound = not census["spills"] and census["shared"] <= SHARED_LIMIT[target]
        if sound or config == bucket.default:
            predicted[config] = seconds(bucket, census)
    best = min(predicted.values())
    kept = [
        (config, time)
        for config, time in predicted.items()
        if time <= slack * best or config == bucket.default
    ]
    return sorted(kept, key=lambda pair: pair[1])


@functools.cache
def _census(op: str, target: int, num_tokens: int, in_features: int, config: Any) -> dict[str, Any]:
    from ditq_kernels._triton import offline

    problem = offline.Problem(num_tokens, in_features)
    return dataclasses.asdict(offline.compile_problem(op, target, problem, config))


def seconds(bucket: Bucket, census: dict[str, Any]) -> float:
    """Predicted: whole waves of programs, each as long as its busiest unit. A model, for ranking only."""
    machine, prediction = MACHINES[census["target"]], predict(census)
    clocks = prediction.clocks[prediction.limiter]
    waves = math.ceil(_programs(bucket, census["config"]) / machine.sms)
    iterations = _iterations(bucket, census["config"]) if census["loop"] else 1
    return waves * iterations * clocks / machine.hertz


def _programs(bucket: Bucket, config: dict[str, int]) -> int:
    tokens = bucket.num_tokens
    if "rows" in config:
        return math.ceil(tokens / config["rows"])
    if "block_q" in config:
        return bucket.heads * math.ceil(tokens / config["block_q"])
    return math.ceil(tokens / config["block_t"]) * math.ceil(
        bucket.out_features / config["block_n"]
    )


def _iterations(bucket: Bucket, config: dict[str, int]) -> int:
    contracted = bucket.num_tokens if "block_q" in config else bucket.in_features
    return math.ceil(contracted / config["block_k"])


def _row_space(_: Bucket) -> Iterator[tuning.RowConfig]:
    for rows, warps in itertools.product((1, 2, 4, 8), (2, 4, 8, 16)):
        yield tuning.RowConfig(rows, warps)


def _tile_space(bucket: Bucket) -> Iterator[tuning.TileConfig]:
    depths = (128,) if bucket.op.startswith("gemm_w4") else (64, 128, 256)  # W4: its packing unit
    heights = [t for t in (16, 32, 64, 128, 256) if t < 2 * bucket.num_tokens]
    if bucket.num_tokens > 256:
        heights = [t for t in heights if t >= 64]
    for t, n, depth, warps in itertools.product(heights, (64, 128, 256), depths, (4, 8)):
        for stages in (2,) if depth == 256 else (3, 4):
            if bucket.in_features % depth == 0:
                yield tuning.TileConfig(t, n, depth, warps, stages)


def _attention_space(bucket: Bucket) -> Iterator[tuning.AttentionConfig]:
    for q, keys, warps, stages in itertools.product((64, 128), (64, 128, 256), (4, 8), (2, 3)):
        if keys <= bucket.num_tokens:
            yield tuning.AttentionConfig(q, keys, warps, stages)


SPACES: dict[type, Callable[[Bucket], Iterator[Any]]] = {
    tuning.RowConfig: _row_space,
    tuning.TileConfig: _tile_space,
    tuning.AttentionConfig: _attention_space,
}


def _fits(config: Any, target: int) -> bool:
    """By arithmetic, before anything is compiled: sums in registers, tiles in shared memory."""
    if isinstance(config, tuning.RowConfig):
        return True
    if isinstance(config, tuning.AttentionConfig):
        return config.block_q * config.block_k <= ACCUMULATORS * 32 * config.num_warps
    tile = config.block_t * config.block_n
    shared = config.num_stages * (config.block_t + config.block_n) * config.block_k
    sums = tile // (32 * config.num_warps)
    small = tile <= 64 * 64 and config.num_warps == 4
    return (small or 32 <= sums <= ACCUMULATORS) and shared <= SHARED_LIMIT[target]


def _row_wise(op: str) -> bool:
    return op.startswith("quantize")


def _default(op: str, target: int, num_tokens: int, in_features: int) -> Any:
    from ditq_kernels._triton import offline

    return offline.tuned_config(op, target, offline.Problem(num_tokens, in_features))
