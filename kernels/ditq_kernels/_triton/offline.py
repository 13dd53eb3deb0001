"""Compile a kernel for a GPU that is not there, and take a census of its machine code.

    python -m ditq_kernels._triton.offline --op gemm_w8a8 --target 90 --json

The Triton wheel carries the assembler and disassembler, so a machine without a GPU can tell whether
integer tensor cores are used, registers spill, or a layout mistake fills the hot loop. It cannot run
where TRITON_INTERPRET is set: kernels are then Python functions.
"""

import argparse
import collections
import dataclasses
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ditq_kernels import tuning
from ditq_kernels._triton import (
    attention,
    attention_qk_int8_pv_bf16,
    attention_qk_int8_pv_int8,
    gemm_w4a8,
    gemm_w8a8,
    prepared_w4,
    quantize_per_token,
    quantize_static,
)
from ditq_kernels._triton.common import GROUP_T, INTERPRETED
from ditq_kernels._triton.rows import row_parts
from ditq_kernels.backend import TRITON_OPS

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

POINTERS = {
    "x_ptr": "*bf16", "q_ptr": "*i8", "weight_ptr": "*i8", "split_ptr": "*u8", "groups_ptr": "*i32",
    "out_ptr": "*bf16", "scale_ptr": "*fp32", "weight_scale_ptr": "*fp32", "bias_ptr": "*fp32",
    "smooth_inv_ptr": "*fp32", "zero_point_ptr": "*i32", "weight_sum_ptr": "*i32",
    "k_ptr": "*i8", "v_ptr": "*bf16", "vt_ptr": "*i8", "v_sum_ptr": "*i32", "key_mask_ptr": "*u8",
    "q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32", "softmax_step": "fp32",
}  # fmt: skip
# what Triton finds at launch: torch memory is aligned, and so are strides of DiT widths
MULTIPLES_OF_16 = frozenset(POINTERS) - {"softmax_step"} | {
    "N", "K", "stride_xt", "stride_qt", "stride_wn", "stride_sn", "stride_ot",
    "PADDED_K", "stride_qb", "stride_kb", "stride_vb",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Census:
    """What one compiled kernel is made of. Opcode counts are static, per warp."""

    op: str
    target: int
    config: dict[str, int]
    registers: int
    stack: int  # bytes a thread; more than 0 means spills
    spills: int  # local memory instructions
    shared: int  # bytes a program, dynamic
    mma: dict[str, int]  # tensor-core opcodes with their suffixes, whole kernel
    loop: dict[str, int]  # opcodes of the hot loop: the longest innermost one with tensor-core instructions
    whole: dict[str, int]  # opcodes of the whole kernel

    @property
    def loop_instructions(self) -> int:
        """Instructions of one hot-loop iteration."""
        return sum(self.loop.values())


def compile_op(
    op: str,
    target: int,
    num_tokens: int = 8192,
    in_features: int = 1152,
    group_size: int = 64,
    zero_point: bool = False,
    config: tuning.TileConfig | tuning.RowConfig | tuning.AttentionConfig | None = None,
) -> Census:
    """Compile an op with its tuned configuration (or another) and count instructions.

    Args:
        op: an op with a Triton kernel, such as "gemm_w8a8".
        target: compute capability without the dot, such as 90.
        num_tokens: T, picks the configuration; the number of keys for attention.
        in_features: K, a multiple of 16; the head dimension for attention.
        group_size: neighbouring inputs sharing a group, for gemm_w4a8.
        zero_point: activations are asymmetric, for the GEMMs; values, for attention.
        config: instead of the tuned one.

    Raises:
        RuntimeError: TRITON_INTERPRET is set.
    """
    if INTERPRETED:
        raise RuntimeError("offline: unset TRITON_INTERPRET, an interpreted kernel has no machine code")
    if config is None:
        config = _tuned(op, target, num_tokens, in_features)
    if op.startswith("quantize"):
        kernel, constants = _row_kernel(op, in_features, config)
    elif op.startswith("attention"):
        kernel, constants = _attention_kernel(op, num_tokens, in_features, zero_point, config)
    else:
        kernel, constants = _tile_kernel(op, in_features, group_size, zero_point, config)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    if not isinstance(config, tuning.RowConfig):
        options["num_stages"] = config.num_stages
    compiled = triton.compile(
        _source(kernel, constants), target=GPUTarget("cuda", target, 32), options=options
    )
    return _census(op, target, config, compiled)


def _tuned(op, target, num_tokens, in_features):
    tables = tuning.tables_of_architecture(f"sm_{target}")
    if op.startswith("quantize"):
        return tuning.row_config(op, tables, num_tokens, in_features)
    if op.startswith("attention"):
        return tuning.attention_config(op, tables, num_tokens, in_features)
    return tuning.tile_config(op, tables, num_tokens, in_features)


def _row_kernel(op, in_features, config):
    module = {"quantize_per_token": quantize_per_token, "quantize_static": quantize_static}[op]
    block_a, block_b = row_parts(in_features)
    constants = {"ROWS": config.rows, "BLOCK_A": block_a, "BLOCK_B": block_b}
    return getattr(module, f"_{op}_kernel"), constants | {"smooth_inv_ptr": None}


def _tile_kernel(op, in_features, group_size, zero_point, config):
    constants = {
        "BLOCK_T": config.block_t, "BLOCK_N": config.block_n, "GROUP_T": GROUP_T,
        "PER_TOKEN_SCALE": True, "PER_TOKEN_ZERO": zero_point,
    }  # fmt: skip
    if not zero_point:
        constants |= {"zero_point_ptr": None, "weight_sum_ptr": None}
    if op == "gemm_w8a8":
        constants |= {"BLOCK_K": config.block_k, "EVEN_K": in_features % config.block_k == 0}
        return gemm_w8a8._gemm_w8a8_kernel, constants
    unit = prepared_w4.kernel_unit(in_features, group_size)
    constants |= {"UNIT": unit, "EVEN_K": in_features % unit == 0, "GROUP_SIZE": group_size}
    return gemm_w4a8._gemm_w4a8_kernel, constants | {"INLINE_ASM": True}


def _attention_kernel(op, num_keys, head_dim, zero_point, config):
    """Heads inside tokens, as projections write them; scales per head for V, per token for Q and K."""
    strides = {f"STRIDE_{name}H": head_dim for name in "QKV"}
    strides |= {f"STRIDE_{name}T": 16 * head_dim for name in "QKV"}
    parts = attention.VALUE_PARTS[head_dim]
    constants = {
        "Q_SCALE": attention.PER_TOKEN.value, "K_SCALE": attention.PER_TOKEN.value,
        "V_SCALE": attention.PER_HEAD.value, "ZERO_POINT": attention.PER_HEAD.value,
        "BF16_DOT": True, "key_mask_ptr": None,
    }  # fmt: skip
    constants |= strides
    constants |= attention.shape_constants(head_dim, num_keys, config.block_q, config.block_k, parts)
    if not zero_point:
        constants |= {"zero_point_ptr": None}
    module = {
        "attention_qk_int8_pv_int8": attention_qk_int8_pv_int8,
        "attention_qk_int8_pv_bf16": attention_qk_int8_pv_bf16,
    }[op]
    kernel = getattr(module, f"_{op}_kernel")
    return kernel, {name: value for name, value in constants.items() if name in kernel.arg_names}


def _source(kernel, constants):
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in MULTIPLES_OF_16 and name not in constants
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)


def _census(op, target, config, compiled) -> Census:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        machine_code = _disassemble("-sass", cubin.name)
        usage = _disassemble("-res-usage", cubin.name)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"offline: cuobjdump reported no resource usage for {op}: {usage[-200:]}")
    instructions = _instructions(machine_code)
    whole = _count(instructions)
    mma = collections.Counter(
        name for _, text in instructions if "MMA" in (name := _opcode(text)).split(".")[0]
    )
    return Census(
        op=op, target=target, config=dataclasses.asdict(config),
        registers=int(resources[1]), stack=int(resources[2]),
        spills=whole["LDL"] + whole["STL"], shared=compiled.metadata.shared,
        mma=dict(mma), loop=dict(_count(_hot_loop(instructions))), whole=dict(whole),
    )  # fmt: skip


def _disassemble(what: str, path: str) -> str:
    done = subprocess.run([DISASSEMBLER, what, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _instructions(machine_code: str) -> list[tuple[int, str]]:
    """(address, text) of every instruction."""
    found = re.finditer(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", machine_code, re.MULTILINE)
    return [(int(match[1], 16), match[2].strip()) for match in found]


def _hot_loop(instructions: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Body of the longest innermost loop with tensor-core instructions; empty if there is none."""
    loops = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch is not None and int(branch[1], 16) < address:
            body = [item for item in instructions if int(branch[1], 16) <= item[0] <= address]
            if any("MMA" in text for _, text in body):
                loops.append(body)
    innermost = [loop for loop in loops if not any(_inside(other, loop) for other in loops)]
    return max(innermost, key=len, default=[])


def _inside(inner: list[tuple[int, str]], outer: list[tuple[int, str]]) -> bool:
    return len(inner) < len(outer) and outer[0] <= inner[0] and inner[-1] <= outer[-1]


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P[T\d]+\s+", "", text).split()[0]


def _count(instructions: list[tuple[int, str]]) -> collections.Counter:
    return collections.Counter(_opcode(text).split(".")[0] for _, text in instructions)


def main() -> None:
    """Print the census of one kernel."""
    parser = argparse.ArgumentParser(description="census of a kernel's machine code, without a GPU")
    parser.add_argument("--op", required=True, choices=sorted(TRITON_OPS))
    parser.add_argument("--target", type=int, required=True, help="compute capability, such as 90")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--in-features", type=int, default=1152)
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
