"""The GEMM of several layers to compile without tensors: those of a single block of Flux, counted."""

from typing import Any

from ditq_kernels._triton import gemm_many
from ditq_kernels._triton.offline import gemms
from ditq_kernels._triton.offline.problem import Problem, Specialized
from ditq_kernels._triton.parts.epilogue import Epilogue
from ditq_kernels.launch import tuning

SEGMENTS = 4


def each(kind: Any) -> tuple[Any, ...]:
    """The same type for every segment."""
    return (kind,) * SEGMENTS


def w8a8_kernel(op: str, problem: Problem, config: tuning.TileConfig) -> Specialized:
    """Int8 weights."""
    _, constants = gemms.w8a8_kernel("gemm_w8a8", problem, config)
    return gemm_many._gemm_many_w8a8_kernel, _with_segments(constants, {"weights": "*i8"})


def w4a8_kernel(op: str, problem: Problem, config: tuning.TileConfig) -> Specialized:
    """Progressive int4 weights."""
    _, constants = gemms.w4a8_kernel("gemm_w4a8", problem, config)
    types = {"splits": "*u8", "group_scales": "*u8", "group_offsets": "*i8"}
    return gemm_many._gemm_many_w4a8_kernel, _with_segments(constants, types)


def w4a8_per_group_kernel(op: str, problem: Problem, config: tuning.TileConfig) -> Specialized:
    """Int4 weights with real groups."""
    _, constants = gemms.w4a8_per_group_kernel("gemm_w4a8_per_group", problem, config)
    constants.pop("weight_sum_ptr", None)
    types = {"splits": "*u8", "weight_scales": "*fp32", "weight_zeros": "*u8"}
    sums = {"weight_sums": each("*i32") if problem.zero_point else None}
    return gemm_many._gemm_many_w4a8_per_group_kernel, _with_segments(constants | sums, types)


def tiles_of(op: str, tables: tuple[str, ...], num_tokens: int, in_features: int) -> tuning.TileConfig:
    """The launch of the plain GEMM."""
    return tuning.tile_config(op.partition("+")[0], tables, num_tokens, in_features)


def _with_segments(constants: dict[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """Constants of a plain GEMM, with a tuple of each segment's in the place of what differs."""
    given: Epilogue = constants["epilogue"]
    scales, bias = given.scales, given.bias
    weight_scale, weight_sum = (
        None if one is None else each(one) for one in (scales.weight_scale, scales.weight_sum)
    )
    epilogue = Epilogue(
        scales._replace(weight_scale=weight_scale, weight_sum=weight_sum), bias=bias._replace(table=each(bias.table))
    )
    kept = {name: value for name, value in constants.items() if name != "SPLITS"}
    parts = {name: each(kind) for name, kind in types.items()}
    return kept | parts | {"outs": each("*bf16"), "widths": each("i32:16"), "epilogue": epilogue}
