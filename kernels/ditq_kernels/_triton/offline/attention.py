"""Attention to compile without tensors, in three forms.

As torch calls it: heads inside tokens, as projections write them; a scale a token for Q and K, a transposed copy of V
with its sums, float outputs. "+static", as a fused block with calibrated scales calls it: a scale a head, rows of Q
and K padded to whole products, V with tokens inside, codes of the outputs. "+strict" looks twice at the keys always.
"""

from typing import Any

from ditq_kernels._triton import attention_qk_int8_pv_bf16, attention_qk_int8_pv_int8
from ditq_kernels._triton.parts import softmax_tiles as attention
from ditq_kernels._triton.parts import transpose_v
from ditq_kernels.checks.attention import MAX_STRICT_KEYS
from ditq_kernels.launch import tuning

MODULES = {
    "attention_qk_int8_pv_int8": attention_qk_int8_pv_int8,
    "attention_qk_int8_pv_bf16": attention_qk_int8_pv_bf16,
}
STATIC = "+static"
STRICT = "+strict"
OPS = (*MODULES, *(op + STATIC for op in MODULES), *(op + STRICT for op in MODULES))
HEADS_OF_TOKENS = 16


def types_of(op: str) -> dict[str, str]:
    """Types of arguments that differ from those of other kernels."""
    values = {"v_ptr": "*i8"} if "pv_int8" in op else {}
    return values | ({"out_ptr": "*i8"} if op.endswith(STATIC) else {})


def config_of(op: str, tables: tuple[str, ...], num_keys: int, head_dim: int) -> tuning.AttentionConfig:
    """All forms share launches."""
    return tuning.attention_config(op.partition("+")[0], tables, num_keys, head_dim)


def attention_kernel(op: str, problem: Any, config: tuning.AttentionConfig) -> tuple[Any, dict[str, Any]]:
    """The jit function and its constants."""
    num_keys, head_dim, static = problem.num_tokens, problem.in_features, op.endswith(STATIC)
    kind = attention.PER_HEAD.value if static else attention.PER_TOKEN.value
    parts = attention.VALUE_PARTS[head_dim]
    constants = {
        "Q_SCALE": kind, "K_SCALE": kind, "V_SCALE": attention.PER_HEAD.value,
        "ZERO_POINT": attention.PER_HEAD.value, "BF16_DOT": True, "EVEN_V": True, "INLINE_ASM": True,
        "STRICT": STRICT in op or (static and "pv_int8" in op and num_keys <= MAX_STRICT_KEYS),
        **_strides(num_keys, head_dim, static),
        **attention.shape_constants(head_dim, num_keys, config.block_q, config.block_k, parts),
    }  # fmt: skip
    unused = ["key_mask_ptr", "out_smooth_inv_ptr"]
    unused += ["v_sum_ptr"] if static else ["out_scale_ptr", "out_zero_point_ptr"]
    unused += [] if problem.zero_point else ["zero_point_ptr"]
    constants |= dict.fromkeys(unused)
    name = op.partition("+")[0]
    kernel = getattr(MODULES[name], f"_{name}_kernel")
    return kernel, {name: value for name, value in constants.items() if name in kernel.arg_names}


def _strides(num_keys: int, head_dim: int, static: bool) -> dict[str, int]:
    if not static:
        inside = {f"STRIDE_{name}H": head_dim for name in "QKV"}
        return inside | {f"STRIDE_{name}T": HEADS_OF_TOKENS * head_dim for name in "QKV"}
    row = {"Q": sum(attention.SCORE_PARTS[head_dim]), "V": head_dim}
    row["K"] = row["Q"]
    return {f"STRIDE_{name}T": size for name, size in row.items()} | {
        f"STRIDE_{name}H": num_keys * size for name, size in row.items()
    }


def transpose_kernel(_: str, problem: Any, config: tuning.RowConfig) -> tuple[Any, dict[str, Any]]:
    """The same, of the copy of V."""
    head_dim = problem.in_features
    constants = {
        "STRIDE_VH": head_dim, "STRIDE_VT": HEADS_OF_TOKENS * head_dim,
        "D": head_dim, "WIDTH": sum(attention.VALUE_PARTS[head_dim]),
        "BLOCK_D": transpose_v.BLOCK_D, "BLOCK_T": config.rows, "WHOLE_SUMS": False,
    }  # fmt: skip
    return transpose_v._transpose_v_kernel, constants


def transpose_config(*_: Any) -> tuning.RowConfig:
    """Its only launch."""
    return tuning.RowConfig(transpose_v.MAX_BLOCK_T, num_warps=4)
