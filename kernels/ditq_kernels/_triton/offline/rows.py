"""Kernels of rows to compile without tensors: quantizers, alone and fused, and the expansion of weights.

Each function gives the jit function and its constants, for an op, a problem and a launch.
"""

from collections.abc import Callable
from typing import Any

from triton import language as tl

from ditq_kernels._triton import (
    adaln_quantize,
    quantize_heads,
    quantize_per_token,
    quantize_static,
    w4_expand,
)
from ditq_kernels._triton.offline.problem import Problem, Specialized
from ditq_kernels._triton.parts.rows import Before, row_parts
from ditq_kernels.launch import tuning

HEAD_DIM = 72  # of DiT-XL and PixArt
FLUX_HEAD_DIM = 128  # and of Qwen, Wan
# of a site whose transform its quantizer applies; a program has rows of one sample
SHIFT = {
    "group_shift": "*fp32", "group_index": "*i64", "rows_per_sample": "i32:16",
    "one_sample": tl.constexpr(True), "smooth_inv": "*fp32",
}  # fmt: skip


def row_kernel(op: str, problem: Problem, config: tuning.RowConfig) -> Specialized:
    """A quantizer of rows, its stages before and zero points as the name of the op says."""
    quantizer, _, stages = op.removeprefix("gelu_").partition("+")
    module = {"quantize_per_token": quantize_per_token, "quantize_static": quantize_static}[quantizer]
    block_a, block_b = row_parts(problem.in_features)
    before = Before(tl.constexpr(op.startswith("gelu_")))
    if "shift" in stages:
        before = before._replace(**SHIFT)
    constants: dict[str, Any] = {"ROWS": config.rows, "BLOCK_A": block_a, "BLOCK_B": block_b, "before": before}
    if quantizer == "quantize_static":
        constants["HEAD_DIM"] = 0
    elif "asymmetric" not in stages:
        constants["zero_point_ptr"] = None
    return getattr(module, f"_{quantizer}_kernel"), constants


def heads_kernel(_: str, problem: Problem, config: tuning.RowConfig) -> Specialized:
    """A quantizer with a scale per head."""
    kernel, constants = row_kernel("quantize_static", problem, config)
    return kernel, constants | {"zero_point_ptr": None, "HEAD_DIM": HEAD_DIM}


def attention_heads_kernel(op: str, problem: Problem, config: tuning.RowConfig) -> Specialized:
    """Norm and rotation of queries or keys before their quantizer, of all heads' channels together, as Flux has it."""
    held, block_d, _ = quantize_heads.shape_of_program(
        problem.in_features // FLUX_HEAD_DIM, FLUX_HEAD_DIM, wide="wide" in op
    )
    constants = {
        "D": FLUX_HEAD_DIM, "BLOCK_D": block_d, "HEADS": held, "WIDE": "wide" in op, "INTERLEAVED": True,
        "PAIRS": False, "in_scale_ptr": None, "shift_ptr": None, "stride_cd": 1,
    }  # fmt: skip
    return quantize_heads._quantize_heads_kernel, constants


def attention_heads_config(
    op: str, tables: tuple[str, ...], num_tokens: int, in_features: int) -> tuning.RowConfig:
    """Its only launch."""
    held, _, num_warps = quantize_heads.shape_of_program(
        in_features // FLUX_HEAD_DIM, FLUX_HEAD_DIM, wide="wide" in op
    )
    return tuning.RowConfig(held, num_warps)


def w4_expand_kernel(_: str, problem: Problem, config: tuning.RowConfig) -> Specialized:
    """Int8 weights from int4 codes."""
    constants = {"GROUP_SIZE": problem.group_size, "ROWS": config.rows, "BYTES": w4_expand.BYTES}
    return w4_expand._w4_expand_kernel, constants


def adaln_kernel(op: str, problem: Problem, config: tuning.RowConfig) -> Specialized:
    """Layer norm and modulation before a quantizer."""
    block_a, block_b = row_parts(problem.in_features)
    constants = {
        "ROWS": config.rows, "BLOCK_A": block_a, "BLOCK_B": block_b, "ONE_SAMPLE": True,
        "smooth_inv_ptr": None, "group_shift_ptr": None, "group_index_ptr": None, "values_ptr": None,
    }  # fmt: skip
    unused = ["scale_ptr", "zero_point_ptr"]
    if op.startswith("adaln_quantize_per_token"):
        unused = ["in_scale_ptr", "in_zero_point_ptr"] + ["zero_point_ptr"] * (not op.endswith("+asymmetric"))
    return adaln_quantize._adaln_quantize_kernel, constants | dict.fromkeys(unused)


def same_rows_as(tuned_op: str) -> Callable[..., tuning.RowConfig]:
    """The launch of another op."""
    return lambda _, tables, *shape: tuning.row_config(tuned_op, tables, *shape)
