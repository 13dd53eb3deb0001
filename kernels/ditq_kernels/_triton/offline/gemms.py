"""GEMMs to compile without tensors: with int8 and int4 weights, of three weights, weight-only, the low-rank branch.

Each function gives the jit function and its constants, for an op, a problem and a launch.
"""

from typing import Any

from ditq_kernels._triton import (
    gemm_qkv_quantize,
    gemm_w4a8,
    gemm_w4a8_per_group,
    gemm_w8a8,
    lora_down,
    weight_only,
)
from ditq_kernels._triton.offline import epilogue as offline_epilogue
from ditq_kernels._triton.offline.problem import Problem, Specialized
from ditq_kernels._triton.parts.common import GROUP_T
from ditq_kernels.codes import packing
from ditq_kernels.launch import tuning


def _gemm_constants(op: str, problem: Problem, config: tuning.TileConfig) -> dict[str, Any]:
    epilogue = offline_epilogue.epilogue_of(op, problem.zero_point)
    tiles = {"BLOCK_T": config.block_t, "BLOCK_N": config.block_n, "GROUP_T": GROUP_T, "PARTS": config.parts}
    return tiles | {"epilogue": epilogue}


def w8a8_kernel(op: str, problem: Problem, config: tuning.TileConfig) -> Specialized:
    """Int8 weights."""
    even = problem.in_features % config.block_k == 0
    constants = {"BLOCK_K": config.block_k, "EVEN_K": even, "SPLITS": 1}
    return gemm_w8a8._gemm_w8a8_kernel, constants | _gemm_constants(op, problem, config)


def w4a8_kernel(op: str, problem: Problem, config: tuning.TileConfig) -> Specialized:
    """Progressive int4 weights."""
    unit = packing.kernel_unit(problem.in_features, problem.group_size)
    constants = {
        "UNIT": unit, "EVEN_K": problem.in_features % unit == 0, "SPLITS": 1,
        "GROUP_SIZE": problem.group_size, "INLINE_ASM": True,
    }  # fmt: skip
    return gemm_w4a8._gemm_w4a8_kernel, constants | _gemm_constants(op, problem, config)


def qkv_w8a8_kernel(op: str, problem: Problem, config: tuning.TileConfig) -> Specialized:
    """Three int8 weights."""
    _, constants = w8a8_kernel("gemm_w8a8", problem, config)
    weights = {"weights": offline_epilogue.three("*i8")}
    stages = offline_epilogue.qkv_stages(op.partition("+")[0], problem)
    return gemm_qkv_quantize._gemm_qkv_w8a8_kernel, constants | weights | stages


def qkv_w4a8_kernel(op: str, problem: Problem, config: tuning.TileConfig) -> Specialized:
    """Three progressive int4 weights."""
    _, constants = w4a8_kernel("gemm_w4a8", problem, config)
    three = offline_epilogue.three
    weights = {"splits": three("*u8"), "group_scales": three("*u8"), "group_offsets": three("*i8")}
    stages = offline_epilogue.qkv_stages(op.partition("+")[0], problem)
    return gemm_qkv_quantize._gemm_qkv_w4a8_kernel, constants | weights | stages


def qkv_w4a8_per_group_kernel(op: str, problem: Problem, config: tuning.TileConfig) -> Specialized:
    """Three int4 weights with real groups."""
    gemm = op.partition("+")[0]
    _, constants = w4a8_per_group_kernel(gemm, problem, config)
    three = offline_epilogue.three
    weights: dict[str, Any]
    weights = {"splits": three("*u8"), "weight_scales": three("*fp32"), "weight_zeros": three("*u8")}
    weights["weight_sums"] = three("*i32") if problem.zero_point else None
    stages = offline_epilogue.qkv_stages(gemm, problem)
    return gemm_qkv_quantize._gemm_qkv_w4a8_per_group_kernel, constants | weights | stages


def lora_down_kernel(_: str, problem: Problem, config: tuning.TileConfig) -> Specialized:
    """The first factor of a low-rank branch."""
    constants = {
        "BLOCK_T": config.block_t, "BLOCK_R": min(32, config.block_n), "BLOCK_K": config.block_k,
        "PER_TOKEN_SCALE": True, "PER_TOKEN_ZERO": problem.zero_point, "BF16_DOT": True,
    }  # fmt: skip
    return lora_down._lora_down_kernel, constants | ({} if problem.zero_point else {"zero_point_ptr": None})


def w4a8_per_group_kernel(op: str, problem: Problem, config: tuning.TileConfig) -> Specialized:
    """Symmetric tokens, one calibrated scale and zero point, or asymmetric tokens, as the op's name says."""
    span = packing.kernel_span(problem.group_size)
    constants: dict[str, Any] = {"BLOCK_T": config.block_t, "BLOCK_N": config.block_n, "GROUP_T": GROUP_T}
    constants |= {"PARTS": config.parts, "PER_TOKEN_ZERO": op.endswith("+asymmetric"), "INLINE_ASM": True}
    constants |= {"EVEN_K": problem.in_features % span == 0}
    constants |= {"epilogue": offline_epilogue.epilogue_of_real_groups(op, problem.zero_point)}
    if not problem.zero_point:
        constants |= {"zero_point_ptr": None, "weight_sum_ptr": None}
    constants |= gemm_w4a8_per_group.group_constants(problem.group_size, span, config.block_k)
    return gemm_w4a8_per_group._gemm_w4a8_per_group_kernel, constants


def weight_only_kernel(op: str, problem: Problem, config: tuning.TileConfig) -> Specialized:
    """Float activations, in three parts."""
    grouped = op == "linear_w4"
    constants: dict[str, Any] = weight_only.group_constants(problem.group_size if grouped else 1, config.block_k)
    constants |= {"PARTS": 3, "BF16_DOT": True, "BLOCK_B": config.block_t, "BLOCK_N": config.block_n}
    if not grouped:
        constants |= {"group_scale_ptr": None, "group_offset_ptr": None}
    return weight_only._weight_only_kernel, constants
