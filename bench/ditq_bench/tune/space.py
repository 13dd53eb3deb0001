"""Which launches are worth timing: the best by the wave model, less those that spill or the issue model rules out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ditq_bench.census.issue_model import MACHINES, predict
from ditq_kernels.launch import tuning, waves

LOWEST_OF_MANY = 512  # tokens; fewer have no second tile for a program
STAYING: tuple[dict[str, Any], ...] = ({"programs_per_sm": 1}, {"programs_per_sm": 2})
# two loops, the inner one as short as without staying; Hopper's products wait for one another in the one long loop
UNFLATTENED = tuple(field | {"flatten": False} for field in STAYING)
BY_TMA: tuple[dict[str, Any], ...] = (
    {"loads": "tma"}, *({"loads": "tma"} | field for field in STAYING),
    {"loads": "tma", "programs_per_sm": 1, "specialize": True},
)  # fmt: skip
SLACK = 1.5  # launches predicted this much slower than the best are dropped
WIDTHS, HEAD_DIMS = (1152, 3072, 4608, 15360), (72, 128)  # K of DiTs and of Flux's widest linear; D
MANY_TOKENS = {"attention": 1024, "linear": 64}  # by the beginning of an op's name; of others 8192
ACCUMULATORS = (
    128  # fp32 or int32 sums a thread; twice as many registers leave nothing for operands
)
COMPILED, OF_ONE_TILE = (
    12,
    3,
)  # GEMM launches of a bucket, the best by the wave model; of them with the same tile
ROW_VALUES = 128  # of a row kernel in a thread; compiling more takes minutes
SHARED_LIMIT = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}


# tables whose kernels have other names offline; of the stages the one that needs most registers
OFFLINE = {
    "adaln_quantize": "adaln_quantize_static",
    "gemm_w8a8_epilogue": "gemm_w8a8+low_rank",
    "gemm_w4a8_epilogue": "gemm_w4a8+low_rank",
    "gemm_w4a8_per_group_epilogue": "gemm_w4a8_per_group+low_rank",
}
SHARED_TILES = ("gemm_w8a8", "gemm_w4a8", "gemm_w8a8_epilogue", "gemm_w4a8_epilogue")  # see waves


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
    left = set(ops)  # a table hides those after it
    for table in tuning.tables_of_architecture(f"sm_{target}"):
        own = {op: rows for op, rows in tuning.load_table(table)["ops"].items() if op in left}
        left -= set(own)
        for op, rows in own.items():
            for row in rows:
                limits = {name: value for name, value in row.items() if name.startswith("max_")}
                kind = "attention" if op.startswith("attention") else ""
                sizes = HEAD_DIMS if kind else WIDTHS
                limit = limits.get("max_in_features", sizes[-1] if _row_wise(op) else sizes[0])
                inputs = max((size for size in sizes if size <= limit), default=limit)
                many = MANY_TOKENS.get(op.partition("_")[0], 8192)
                tokens = limits.get("max_tokens", many)
                found.append(
                    Bucket(op, limits, tokens, inputs, _default(op, target, tokens, inputs))
                )
    return found


def launches(bucket: Bucket, target: int) -> list[Any]:
    """Launches that fit by arithmetic, the default first."""
    kind = type(bucket.default)
    fitting = [config for config in SPACES[kind](bucket) if _fits(bucket, config, target)]
    others = [config for config in fitting if config != bucket.default]
    if kind is tuning.TileConfig:
        others = _likely(bucket, others, target)
    return [bucket.default, *others]


def variants(bucket: Bucket, config: Any, target: int) -> list[Any]:
    """The same tile by programs that stay, or that load by TMA; ranked by no model, so a GPU has to time them."""
    if bucket.op != "gemm_w8a8" or bucket.num_tokens < LOWEST_OF_MANY:
        return []
    fields = [*STAYING, *((*UNFLATTENED, *BY_TMA) if target == 90 else ())]
    return [dataclasses.replace(config, split_k=1, **field) for field in fields]


def prune(
    bucket: Bucket,
    target: int,
    advance: Callable[[], None] = lambda: None,
    slack: float = SLACK,
    end: float = math.inf,
) -> list[tuple[Any, float | None]]:
    """(launch, predicted seconds), the best first; the default is always kept.

    Compiles launches, one to two seconds each, until `time.perf_counter()` reaches `end`; what is not compiled by then
    is dropped, and a default that is not has no prediction. Drops those that spill, need more shared memory than the
    architecture has, or are predicted `slack` times slower than the best.
    """
    predicted: dict[Any, float] = {}
    for config in launches(bucket, target):
        if time.perf_counter() > end:
            advance()
            continue
        tokens = bucket.num_tokens if bucket.op.startswith("attention") else 8192
        census = _census(
            OFFLINE.get(bucket.op, bucket.op), target, tokens, bucket.in_features, config
        )
        advance()
        sound = not census["spills"] and census["shared"] <= SHARED_LIMIT[target]
        if sound or config == bucket.default:
            predicted[config] = seconds(bucket, census)
    if bucket.default not in predicted:
        return [(bucket.default, None)]
    best = min(predicted.values())
    kept = [
        (config, time)
        for config, time in predicted.items()
        if time <= slack * best or config == bucket.default
    ]
    return [*sorted(kept, key=lambda pair: pair[1])]


@functools.cache
def _census(op: str, target: int, num_tokens: int, in_features: int, config: Any) -> dict[str, Any]:
    from ditq_kernels._triton.offline import compile as offline

    problem = offline.Problem(num_tokens, in_features)
    return dataclasses.asdict(offline.compile_problem(op, target, problem, config))


def seconds(bucket: Bucket, census: dict[str, Any]) -> float:
    """Predicted: whole waves of programs, each as long as its busiest unit. A model, for ranking only."""
    machine, prediction = MACHINES[census["target"]], predict(census)
    clocks = prediction.clocks[prediction.limiter]
    waves = math.ceil(_programs(bucket, census["config"]) / machine.sms)
    iterations = _iterations(bucket, census["config"]) if census["loop"] else 1
    return waves * iterations * clocks / machine.hertz


def _likely(
    bucket: Bucket, configs: list[tuning.TileConfig], target: int
) -> list[tuning.TileConfig]:
    """The best by the wave model, before anything is compiled; of equal ones those that look at sums less often."""
    machine = MACHINES[target]
    gpu = waves.Gpu(machine.sms, machine.int8 or 1)

    def clocks(config: tuning.TileConfig) -> tuple[float, int]:
        tile = (config.block_t, config.block_n, config.block_k)
        work = waves.Work(bucket.num_tokens, bucket.in_features, bucket.out_features, *tile)
        splits = waves.best_splits(work, gpu) if config.split_k == "auto" else 1
        return waves.clocks(work, splits, gpu), -config.block_k

    taken: dict[tuple[int, int], list[tuning.TileConfig]] = {}
    for config in sorted(configs, key=clocks):
        same = taken.setdefault((config.block_t, config.block_n), [])
        if len(same) < OF_ONE_TILE and sum(map(len, taken.values())) < COMPILED:
            same.append(config)
    return [config for same in taken.values() for config in same]


def _programs(bucket: Bucket, config: dict[str, Any]) -> int:
    tokens = bucket.num_tokens
    if "rows" in config:
        return math.ceil(tokens / config["rows"])
    if "block_q" in config:
        return bucket.heads * math.ceil(tokens / config["block_q"])
    return math.ceil(tokens / config["block_t"]) * math.ceil(
        bucket.out_features / config["block_n"]
    )


def _iterations(bucket: Bucket, config: dict[str, Any]) -> int:
    contracted = bucket.num_tokens if "block_q" in config else bucket.in_features
    return math.ceil(contracted / config["block_k"])


def _row_space(bucket: Bucket) -> Iterator[tuning.RowConfig]:
    rows_of_program = (8, 16, 32, 64) if bucket.in_features < WIDTHS[0] else (1, 2, 4, 8)
    for rows, warps in itertools.product(rows_of_program, (2, 4, 8, 16)):
        yield tuning.RowConfig(rows, warps)


def _tile_space(bucket: Bucket) -> Iterator[tuning.TileConfig]:
    depths = (128,) if bucket.op.startswith("gemm_w4") else (64, 128, 256)  # W4: its packing unit
    heights = [t for t in (16, 32, 64, 128, 256) if t < 2 * bucket.num_tokens]
    if bucket.num_tokens > 256:
        heights = [t for t in heights if t >= 64]
    split: Any = "auto" if bucket.op in SHARED_TILES else 1
    for t, n, depth, warps in itertools.product(heights, _widths(bucket.op), depths, (4, 8)):
        for stages in (2,) if depth == 256 else (3, 4):
            if bucket.in_features % depth == 0:
                parts = _parts(bucket.op, t * n // (32 * warps))
                yield tuning.TileConfig(t, n, depth, warps, stages, split, parts=parts)


def _parts(op: str, sums: int) -> int:
    """Parts of a tile for its epilogue: about 32 sums a thread at once, in which nothing spills."""
    return min(4, max(1, sums // 32)) if op.endswith("_epilogue") else 1


def _widths(op: str) -> tuple[int, ...]:
    """Outputs of a tile: few for the rank of a low-rank branch and for the rows of modulation layers."""
    if op == "lora_down":
        return (16, 32, 64)
    return (16, 32, 64, 128) if op.startswith("linear") else (64, 128, 256)


def _attention_space(bucket: Bucket) -> Iterator[tuning.AttentionConfig]:
    for q, keys, warps, stages in itertools.product((64, 128), (64, 128, 256), (4, 8), (2, 3)):
        if keys <= bucket.num_tokens:
            yield tuning.AttentionConfig(q, keys, warps, stages)


SPACES: dict[type, Callable[[Bucket], Iterator[Any]]] = {
    tuning.RowConfig: _row_space,
    tuning.TileConfig: _tile_space,
    tuning.AttentionConfig: _attention_space,
}


def _fits(bucket: Bucket, config: Any, target: int) -> bool:
    """By arithmetic, before anything is compiled: sums in registers, tiles in shared memory."""
    if isinstance(config, tuning.RowConfig):
        values = config.rows * 2 ** math.ceil(math.log2(bucket.in_features))
        return values <= ROW_VALUES * 32 * config.num_warps
    if isinstance(config, tuning.AttentionConfig):
        return config.block_q * config.block_k <= ACCUMULATORS * 32 * config.num_warps
    tile = config.block_t * config.block_n
    shared = config.num_stages * (config.block_t + config.block_n) * config.block_k
    sums = tile // (32 * config.num_warps)
    small = tile <= 64 * 64 and config.num_warps == 4
    return (small or 32 <= sums <= ACCUMULATORS) and shared <= SHARED_LIMIT[target]


def _row_wise(op: str) -> bool:
    return "quantize" in op


def _default(op: str, target: int, num_tokens: int, in_features: int) -> Any:
    from ditq_kernels._triton.offline import compile as offline

    problem = offline.Problem(num_tokens, in_features)
    if op.endswith("_epilogue"):
        tables = tuning.tables_of_architecture(f"sm_{target}")
        return tuning.tile_config(op, tables, num_tokens, in_features)
    return offline.tuned_config(OFFLINE.get(op, op), target, problem)
