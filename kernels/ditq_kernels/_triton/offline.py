"""Compile a kernel for a GPU that is not there, and take a census of its machine code.

    python -m ditq_kernels._triton.offline --op gemm_w8a8 --target 90 --json

The Triton wheel carries the assembler and disassembler, so a machine without a GPU can tell whether
integer tensor cores are used, registers spill, or a layout mistake fills the hot loop. It cannot run
where TRITON_INTERPRET is set: kernels are then Python functions.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ditq_kernels import tuning
from ditq_kernels._triton import (
    adaln_quantize,
    gemm_qkv_quantize,
    gemm_w4a8,
    gemm_w4a8_per_group,
    gemm_w8a8,
    lora_down,
    offline_attention,
    offline_epilogue,
    offline_variants,
    prepared_w4,
    prepared_w4g,
    quantize_per_token,
    quantize_static,
    w4_expand,
    weight_only,
)
from ditq_kernels._triton.common import GROUP_T, INTERPRETED
from ditq_kernels._triton.machine_code import Census, census_of
from ditq_kernels._triton.rows import row_parts
from ditq_kernels._triton.stages import our_passes

UNSERVED_TARGETS = {100: 90, 120: 89}
POINTERS = {
    "x_ptr": "*bf16", "q_ptr": "*i8", "weight_ptr": "*i8", "split_ptr": "*u8", "groups_ptr": "*i32",
    "out_ptr": "*bf16", "scale_ptr": "*fp32", "smooth_inv_ptr": "*fp32", "zero_point_ptr": "*i32",
    "multiplier_ptr": "*fp32", "shift_ptr": "*fp32", "in_scale_ptr": "*fp32", "eps": "fp32",
    "group_scale_ptr": "*u8", "group_offset_ptr": "*i8", "down_ptr": "*bf16", "weight_scale_ptr": "*fp32",
    "weight_zero_ptr": "*i32", "weight_sum_ptr": "*i32", "bias_ptr": "*fp32",
    "k_ptr": "*i8", "v_ptr": "*bf16", "vt_ptr": "*i8", "v_sum_ptr": "*i32", "key_mask_ptr": "*u8",
    "out_scale_ptr": "*fp32", "out_zero_point_ptr": "*i32", "out_smooth_inv_ptr": "*fp32",
    "q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "softmax_step": "fp32",
}  # fmt: skip
# what Triton finds at launch: torch memory is aligned, and so are strides of DiT widths
MULTIPLES_OF_16 = frozenset(POINTERS) - {"softmax_step", "eps"} | {
    "N", "K", "stride_xt", "stride_qt", "stride_wn", "stride_sn", "stride_ot", "stride_dr", "R",
    "stride_mb", "stride_sb", "stride_xb", "stride_ob", "rows_per_sample",
    "PADDED_T", "stride_qb", "stride_kb", "stride_vb", "stride_vh", "stride_vd", "keys_to_read",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is compiled for.

    Attributes:
        num_tokens: T, picks the configuration; the number of keys for attention.
        in_features: K, a multiple of 16; the head dimension for attention.
        group_size: neighbouring inputs sharing a group, for the int4 GEMMs.
        zero_point: activations are asymmetric, for the GEMMs; values, for attention.
    """

    num_tokens: int = 8192
    in_features: int = 1152
    group_size: int = 64
    zero_point: bool = False


Config = tuning.TileConfig | tuning.RowConfig | tuning.AttentionConfig


@dataclasses.dataclass(frozen=True)
class OfflineKernel:
    """One kernel of the table below.

    Attributes:
        problems: what it meets in DiTs, the most telling one first.
        tuned: (op, names of tables, num_tokens, in_features) -> its launch.
        specialize: (op, problem, launch) -> the jit function and its constants.
        types: of arguments that differ from POINTERS.
        targets: architectures it is for; None: all.
        checked: how many launches, of the first problems, the gate of machine code takes.
    """

    problems: tuple[Problem, ...]
    tuned: Callable[[str, tuple[str, ...], int, int], Config]
    specialize: Callable[[str, Problem, Any], tuple[Any, dict[str, Any]]]
    types: dict[str, str] = dataclasses.field(default_factory=dict)
    targets: tuple[int, ...] | None = None
    checked: int = 1


def compile_op(
    op: str,
    target: int,
    num_tokens: int | None = None,
    in_features: int | None = None,
    group_size: int = 64,
    zero_point: bool = False,
    config: Config | None = None,
) -> Census:
    """Compile an op with its tuned configuration (or another) and count instructions.

    Args:
        op: a name in KERNELS, such as "gemm_w8a8".
        target: compute capability without the dot, such as 90.
        num_tokens: as in Problem; default: the op's first problem.
        in_features: as in Problem; default: the op's first problem.
        group_size: as in Problem.
        zero_point: as in Problem.
        config: instead of the tuned one.

    Raises:
        RuntimeError: TRITON_INTERPRET is set.
    """
    usual = KERNELS[op].problems[0]
    problem = Problem(
        num_tokens or usual.num_tokens, in_features or usual.in_features, group_size, zero_point
    )
    return compile_problem(op, target, problem, config)


def compile_problem(
    op: str, target: int, problem: Problem, config: Config | None = None
) -> Census:
    """As `compile_op`, for a problem."""
    if INTERPRETED:
        raise RuntimeError("offline: unset TRITON_INTERPRET, an interpreted kernel has no machine code")
    config = config or tuned_config(op, target, problem)
    kernel, constants = KERNELS[op].specialize(op, problem, config)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    if not isinstance(config, tuning.RowConfig):
        options["num_stages"] = config.num_stages
    source = _source(kernel, constants, KERNELS[op].types)
    with our_passes():
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return census_of(op, target, config, compiled)


def tuned_config(op: str, target: int, problem: Problem) -> Config:
    """The launch of an op's problem on an architecture; sm_100, not served yet, borrows that of sm_90."""
    tables = tuning.tables_of_architecture(f"sm_{UNSERVED_TARGETS.get(target, target)}")
    return KERNELS[op].tuned(op, tables, problem.num_tokens, problem.in_features)


def tuned_problems(op: str, target: int) -> list[tuple[Problem, Config]]:
    """Every launch that an op's problems meet on an architecture, each machine code once; none if it is not for it."""
    if target not in (KERNELS[op].targets or (target,)):
        return []
    found: dict[Any, tuple[Problem, Config]] = {}
    for problem in KERNELS[op].problems:
        config = tuned_config(op, target, problem)
        constants = KERNELS[op].specialize(op, problem, config)[1]
        found.setdefault((config, tuple(map(str, constants.items()))), (problem, config))
    return list(found.values())


def _row_kernel(op, problem, config):
    module = {"quantize_per_token": quantize_per_token, "quantize_static": quantize_static}[op]
    block_a, block_b = row_parts(problem.in_features)
    constants = {"ROWS": config.rows, "BLOCK_A": block_a, "BLOCK_B": block_b}
    constants |= {"smooth_inv_ptr": None, "GELU": False}
    if op == "quantize_static":
        constants["HEAD_DIM"] = 0
    return getattr(module, f"_{op}_kernel"), constants


def _heads_kernel(_, problem, config):
    kernel, constants = _row_kernel("quantize_static", problem, config)
    return kernel, constants | {"zero_point_ptr": None, "HEAD_DIM": HEAD_DIM}


def _gelu_kernel(op, problem, config):
    kernel, constants = _row_kernel(op.removeprefix("gelu_"), problem, config)
    return kernel, constants | {"GELU": True}


def _weight_only_kernel(op, problem, config):
    grouped = op == "linear_w4"
    constants = weight_only.group_constants(problem.group_size if grouped else 1, config.block_k)
    constants |= {"PARTS": 3, "BF16_DOT": True, "BLOCK_B": config.block_t, "BLOCK_N": config.block_n}
    if not grouped:
        constants |= {"group_scale_ptr": None, "group_offset_ptr": None}
    return weight_only._weight_only_kernel, constants


def _w4_expand_kernel(_, problem, config):
    constants = {"GROUP_SIZE": problem.group_size, "ROWS": config.rows, "BYTES": w4_expand.BYTES}
    return w4_expand._w4_expand_kernel, constants


def _adaln_kernel(op, problem, config):
    block_a, block_b = row_parts(problem.in_features)
    constants = {
        "ROWS": config.rows, "BLOCK_A": block_a, "BLOCK_B": block_b, "ONE_SAMPLE": True,
        "smooth_inv_ptr": None, "group_shift_ptr": None, "group_index_ptr": None, "values_ptr": None,
    }  # fmt: skip
    unused = ("in_scale_ptr", "zero_point_ptr") if op.endswith("per_token") else ("scale_ptr",)
    return adaln_quantize._adaln_quantize_kernel, constants | dict.fromkeys(unused)


def _same_rows_as(tuned_op):
    return lambda _, tables, *shape: tuning.row_config(tuned_op, tables, *shape)


def _gemm_constants(op, problem, config):
    epilogue = offline_epilogue.epilogue_of(op, problem.zero_point)
    tiles = {"BLOCK_T": config.block_t, "BLOCK_N": config.block_n, "GROUP_T": GROUP_T}
    return tiles | {"epilogue": epilogue}


def _w8a8_kernel(op, problem, config):
    even = problem.in_features % config.block_k == 0
    constants = {"BLOCK_K": config.block_k, "EVEN_K": even, "SPLITS": 1}
    return gemm_w8a8._gemm_w8a8_kernel, constants | _gemm_constants(op, problem, config)


def _w4a8_kernel(op, problem, config):
    unit = prepared_w4.kernel_unit(problem.in_features, problem.group_size)
    constants = {
        "UNIT": unit, "EVEN_K": problem.in_features % unit == 0, "SPLITS": 1,
        "GROUP_SIZE": problem.group_size, "INLINE_ASM": True,
    }  # fmt: skip
    return gemm_w4a8._gemm_w4a8_kernel, constants | _gemm_constants(op, problem, config)


def _qkv_w8a8_kernel(op, problem, config):
    _, constants = _w8a8_kernel("gemm_w8a8", problem, config)
    weights = {"weights": offline_epilogue.three("*i8")}
    stages = offline_epilogue.qkv_stages(op.partition("+")[0], problem)
    return gemm_qkv_quantize._gemm_qkv_w8a8_kernel, constants | weights | stages


def _qkv_w4a8_kernel(op, problem, config):
    _, constants = _w4a8_kernel("gemm_w4a8", problem, config)
    weights = {"splits": offline_epilogue.three("*u8"), "groups": offline_epilogue.three("*i32")}
    stages = offline_epilogue.qkv_stages(op.partition("+")[0], problem)
    return gemm_qkv_quantize._gemm_qkv_w4a8_kernel, constants | weights | stages


def _qkv_w4a8_per_group_kernel(op, problem, config):
    gemm = op.partition("+")[0]
    _, constants = _w4a8_per_group_kernel(gemm, problem, config)
    three = offline_epilogue.three
    weights = {"splits": three("*u8"), "weight_scales": three("*fp32"), "weight_zeros": three("*i32")}
    weights["weight_sums"] = three("*i32") if problem.zero_point else None
    stages = offline_epilogue.qkv_stages(gemm, problem)
    return gemm_qkv_quantize._gemm_qkv_w4a8_per_group_kernel, constants | weights | stages


def _lora_down_kernel(_, problem, config):
    constants = {
        "BLOCK_T": config.block_t, "BLOCK_R": min(32, config.block_n), "BLOCK_K": config.block_k,
        "PER_TOKEN_SCALE": True, "PER_TOKEN_ZERO": problem.zero_point, "BF16_DOT": True,
    }  # fmt: skip
    return lora_down._lora_down_kernel, constants | ({} if problem.zero_point else {"zero_point_ptr": None})


def _w4a8_per_group_kernel(op, problem, config):
    """Symmetric tokens, or one calibrated scale and zero point: what formats run."""
    span = prepared_w4g.kernel_span(problem.group_size)
    constants = {"BLOCK_T": config.block_t, "BLOCK_N": config.block_n, "GROUP_T": GROUP_T}
    constants |= {"PER_TOKEN_ZERO": False, "EVEN_K": problem.in_features % span == 0, "INLINE_ASM": True}
    constants |= {"epilogue": offline_epilogue.epilogue_of_real_groups(op, problem.zero_point)}
    if not problem.zero_point:
        constants |= {"zero_point_ptr": None, "weight_sum_ptr": None}
    constants |= gemm_w4a8_per_group.group_constants(problem.group_size, span, config.block_k)
    return gemm_w4a8_per_group._gemm_w4a8_per_group_kernel, constants


def _source(kernel, constants, types):
    """What to compile; a constant may be a tuple of types, see `offline_epilogue`."""
    arguments = {
        name: types.get(name, POINTERS.get(name, "i32")) + (":16" if name in MULTIPLES_OF_16 else "")
        for name in kernel.arg_names
    } | constants
    found = {
        name: offline_epilogue.signature_of(arguments[name], (i,))
        for i, name in enumerate(kernel.arg_names)
    }
    return ASTSource(
        fn=kernel, signature={name: part[0] for name, part in found.items()},
        constexprs={path: value for part in found.values() for path, value in part[1].items()},
        attrs={path: value for part in found.values() for path, value in part[2].items()},
    )  # fmt: skip


HEAD_DIM = 72  # of DiT-XL and PixArt
ROWS = tuple(Problem(t, k) for t, k in ((8192, 1152), (256, 1152), (8192, 4608), (256, 15360)))
GEMM_TOKENS = (8192, 16, 32, 256, 512, 1024, 2048)  # 8192: 16 images of 256 pixels, guided
GEMMS = (*(Problem(t) for t in GEMM_TOKENS), Problem(16, 4608))
FEW_TOKENS = (Problem(512, 4608),)  # fc2 of one guided image
REAL_GROUPS = (*GEMMS[:4], *(Problem(8192, 1152, g, z) for g in (32, 64, 128) for z in (False, True)))
HEADS = tuple(
    Problem(keys, head_dim, zero_point=True) for head_dim in (72, 64, 128) for keys in (1024, 256)
)
QKVS = (Problem(8192, zero_point=True), Problem(256, zero_point=True))
MODULATIONS = (Problem(16), Problem(64))
KERNELS = {
    "quantize_per_token": OfflineKernel(ROWS, tuning.row_config, _row_kernel),
    "quantize_static": OfflineKernel(ROWS, tuning.row_config, _row_kernel),
    "quantize_static+heads": OfflineKernel(ROWS[:2], _same_rows_as("quantize_static"), _heads_kernel),
    "gelu_quantize_per_token": OfflineKernel(
        ROWS, _same_rows_as("quantize_per_token"), _gelu_kernel
    ),
    "gelu_quantize_static": OfflineKernel(ROWS, _same_rows_as("quantize_static"), _gelu_kernel),
    "adaln_quantize_per_token": OfflineKernel(ROWS[:3], _same_rows_as("adaln_quantize"), _adaln_kernel),
    "adaln_quantize_static": OfflineKernel(ROWS[:3], _same_rows_as("adaln_quantize"), _adaln_kernel),
    "gemm_w8a8": OfflineKernel(GEMMS, tuning.tile_config, _w8a8_kernel),
    "gemm_w4a8": OfflineKernel(GEMMS, tuning.tile_config, _w4a8_kernel),
    "gemm_w4a8_per_group": OfflineKernel(REAL_GROUPS, tuning.tile_config, _w4a8_per_group_kernel),
    "gemm_w8a8+qkv_quantize": OfflineKernel(QKVS, offline_epilogue.tiles_of, _qkv_w8a8_kernel, {"T": "i32:16"}),
    "gemm_w4a8+qkv_quantize": OfflineKernel(QKVS, offline_epilogue.tiles_of, _qkv_w4a8_kernel, {"T": "i32:16"}),
    "gemm_w4a8_per_group+qkv_quantize": OfflineKernel(
        QKVS, offline_epilogue.tiles_of, _qkv_w4a8_per_group_kernel, {"T": "i32:16"}
    ),
    "lora_down": OfflineKernel((GEMMS[0], GEMMS[1]), tuning.tile_config, _lora_down_kernel),
    "linear_w8": OfflineKernel(MODULATIONS, tuning.tile_config, _weight_only_kernel, {"x_ptr": "*fp32"}),
    "linear_w4": OfflineKernel(
        MODULATIONS, tuning.tile_config, _weight_only_kernel, {"x_ptr": "*fp32", "weight_ptr": "*u8"}
    ),
    "w4_expand": OfflineKernel(
        (Problem(4608),), tuning.row_config, _w4_expand_kernel, {"packed_ptr": "*u8", "out_ptr": "*i8"}
    ),
    "transpose_v": OfflineKernel(
        HEADS[::2], offline_attention.transpose_config, offline_attention.transpose_kernel, {"v_ptr": "*i8"}
    ),
} | {
    f"{gemm}+{stages}": OfflineKernel(
        GEMMS[:2], offline_epilogue.tiles_of, kernel, offline_epilogue.OUTPUTS.get(stages, {})
    )
    for gemm, kernel, those in (
        ("gemm_w8a8", _w8a8_kernel, offline_epilogue.STAGES),
        ("gemm_w4a8", _w4a8_kernel, offline_epilogue.STAGES),
        ("gemm_w4a8_per_group", _w4a8_per_group_kernel, offline_epilogue.STAGES),
    )
    for stages in those
} | {
    op: OfflineKernel(
        HEADS,
        offline_attention.config_of,
        offline_attention.attention_kernel,
        offline_attention.types_of(op),
        checked=2,  # long rows and short ones
    )
    for op in offline_attention.OPS
} | {
    f"{gemm}+split_k": OfflineKernel(
        FEW_TOKENS, offline_variants.split_tiles, offline_variants.split(kernel), offline_variants.SUMS
    )
    for gemm, kernel in (("gemm_w8a8", _w8a8_kernel), ("gemm_w4a8", _w4a8_kernel))
} | {
    "split_k_reduce": OfflineKernel(
        FEW_TOKENS, offline_variants.reduce_rows, offline_variants.reduce_kernel, {"sums_ptr": "*i32"}
    )
} | {
    f"gemm_w8a8+{variant}": OfflineKernel(
        GEMMS[:1], offline_variants.persistent_tiles, offline_variants.persistent(_w8a8_kernel),
        targets=targets,
    )
    for variant, (_, _, targets) in offline_variants.PERSISTENT.items()
}  # fmt: skip


def main() -> None:
    """Print the census of one kernel."""
    parser = argparse.ArgumentParser(description="census of a kernel's machine code, without a GPU")
    parser.add_argument("--op", required=True, choices=sorted(KERNELS))
    parser.add_argument("--target", type=int, required=True, help="compute capability, such as 90")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--in-features", type=int)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--zero-point", action="store_true", help="asymmetric activations")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    census = compile_op(
        args.op, args.target, args.tokens, args.in_features, args.group_size, args.zero_point
    )
    result = dataclasses.asdict(census) | {"loop_instructions": census.loop_instructions}
    if args.json:
        print(json.dumps(result))  # noqa: T201
    else:
        print("\n".join(f"{name}: {value}" for name, value in result.items()))  # noqa: T201


if __name__ == "__main__":
    main()
