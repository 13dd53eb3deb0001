"""Epilogues to compile without tensors: the same named tuples, with a type where a launch has a value.

A leaf is a Triton type such as "*fp32" or "i32:16" (a multiple of 16), a constexpr, or None. A GEMM with more than
scales and one bias is called after its stages, such as "gemm_w8a8+low_rank".
"""

from typing import Any

from triton import language as tl

from ditq_kernels._triton.gemm_qkv_quantize import Heads
from ditq_kernels._triton.parts.epilogue import (
    MAX_BLOCK_R,
    Bias,
    Epilogue,
    GeluCodes,
    LowRank,
    Residual,
    Scales,
)
from ditq_kernels.launch import tuning

ALIGNED = [["tt.divisibility", 16]]
RANK = 32
NO, YES = tl.constexpr(False), tl.constexpr(True)
LOW_RANK = LowRank(
    "*bf16", "*bf16", "i32:16", "i32:16", tl.constexpr(RANK), tl.constexpr(min(MAX_BLOCK_R, RANK)), YES
)  # fmt: skip
GROUPED, GATHERED = (Bias("*fp32", "*i64", "i32:16", one_sample) for one_sample in (YES, NO))
RESIDUAL = Residual("*bf16", "i32:16", "*fp32", "i32:16", "i32:16", YES)
UNGATED = Residual("*bf16", "i32:16")
# stages -> parts of the epilogue, and whether a launch takes the tiles for full registers
STAGES: dict[str, tuple[dict[str, Any], bool]] = {
    "asymmetric": ({"bias": GROUPED}, False),  # scales and zero points per token
    "grouped": ({"bias": GROUPED}, False),  # a tile has rows of one sample
    "gathered": ({"bias": GATHERED}, True),
    "low_rank": ({"bias": GATHERED, "low_rank": LOW_RANK}, True),
    "residual": ({"bias": GROUPED, "residual": RESIDUAL}, True),
    "ungated_residual": ({"bias": GROUPED, "residual": UNGATED}, True),
    "gelu_quantize": ({"bias": GROUPED, "gelu": GeluCodes("*fp32", "*i32", "*fp32")}, True),
}
OUTPUTS = {"gelu_quantize": {"out_ptr": "*i8"}}  # types that are not those of other GEMMs


def epilogue_of(op: str, zero_point: bool) -> Epilogue:
    """The epilogue of an offline GEMM; scales are per token without stages and of asymmetric tokens, else one."""
    _, _, stages = op.partition("+")
    zero = "*i32" if zero_point else None
    per_token = YES if stages in ("", "asymmetric") else NO
    scales = Scales("*fp32", "*fp32", zero, zero, per_token, per_token)
    parts = STAGES[stages][0] if stages else {"bias": Bias("*fp32")}
    return Epilogue(scales, **parts)


def epilogue_of_real_groups(op: str, zero_point: bool) -> Epilogue:
    """The same for the GEMM whose sums have weight scales and zero points in them.

    One scale with one zero point; else a scale per token.
    """
    one_scale = zero_point and not op.endswith("+asymmetric")
    scales = Scales("*fp32", None, None, None, NO if one_scale else YES, NO)
    return epilogue_of(op, zero_point)._replace(scales=scales)


def qkv_stages(op: str, problem: Any) -> dict[str, Any]:
    """Epilogue and heads of the GEMM of three weights: grouped biases, one scale a head, of 72 or 64 outputs."""
    real_groups = op == "gemm_w4a8_per_group"
    make = epilogue_of_real_groups if real_groups else epilogue_of
    epilogue = make(f"{op}+grouped", problem.zero_point)
    scales, bias = epilogue.scales, epilogue.bias
    if not real_groups:
        weight_sum = three(scales.weight_sum) if problem.zero_point else None
        scales = scales._replace(weight_scale=three(scales.weight_scale), weight_sum=weight_sum)
    head_dim = 72 if problem.in_features % 72 == 0 else 64
    heads = Heads(
        three("*i8"), three("*fp32"), three(tl.constexpr(1)), None, None,
        tl.constexpr(head_dim), "i32:16", "i32:16",
    )  # fmt: skip
    return {"epilogue": Epilogue(scales, bias=bias._replace(table=three(bias.table))), "heads": heads}


def three(kind: Any) -> tuple[Any, Any, Any]:
    """The same type for queries, keys and values."""
    return kind, kind, kind


def tiles_of(op: str, tables: tuple[str, ...], num_tokens: int, in_features: int) -> tuning.TileConfig:
    """The launch of an offline GEMM with stages."""
    gemm, _, stages = op.partition("+")
    name = f"{gemm}_epilogue" if stages not in STAGES or STAGES[stages][1] else gemm
    return tuning.tile_config(name, tables, num_tokens, in_features)


def signature_of(value: Any, path: tuple[int, ...]) -> tuple[Any, dict, dict]:
    """Triton's signature, constants and attributes of an argument, by path."""
    if isinstance(value, tuple):
        parts = [signature_of(part, (*path, i)) for i, part in enumerate(value)]
        kinds, constants, attributes = zip(*parts, strict=True)
        made = type(value)(*kinds) if hasattr(value, "_fields") else kinds
        return made, _merged(constants), _merged(attributes)
    if isinstance(value, str):
        kind, _, multiple = value.partition(":")
        return kind, {}, {path: ALIGNED} if kind.startswith("*") or multiple else {}
    return "constexpr", {path: value}, {}


def _merged(parts: tuple[dict, ...]) -> dict:
    return {key: value for part in parts for key, value in part.items()}
