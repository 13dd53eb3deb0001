"""Compile a kernel for a GPU that is not there, and take a census of its machine code.

    python -m ditq_kernels._triton.offline.compile --op gemm_w8a8 --target 90 --json

The Triton wheel carries the assembler and disassembler, so a machine without a GPU can tell whether
integer tensor cores are used, registers spill, or a layout mistake fills the hot loop. It cannot run
where TRITON_INTERPRET is set: kernels are then Python functions.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from ditq_kernels._triton.offline import unserved as offline_unserved
from ditq_kernels._triton.offline.digest import digest_of
from ditq_kernels._triton.offline.kernels import KERNELS
from ditq_kernels._triton.offline.machine_code import Binary, Census, censuses_of
from ditq_kernels._triton.offline.problem import Config, Problem
from ditq_kernels._triton.offline.source import source_of
from ditq_kernels._triton.parts.common import INTERPRETED
from ditq_kernels._triton.parts.stages import our_passes
from ditq_kernels.launch import tuning


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
    problem = problem_of(op, num_tokens, in_features, group_size, zero_point)
    return compile_problem(op, target, problem, config)


def compile_ops(target: int, cases: Sequence[tuple[str, dict[str, Any]]]) -> list[Census]:
    """As `compile_op` of each (op, arguments of `problem_of`), but faster: one disassembler for all."""
    return censuses_of([binary_of(op, target, problem_of(op, **of)) for op, of in cases])


def problem_of(
    op: str,
    num_tokens: int | None = None,
    in_features: int | None = None,
    group_size: int = 64,
    zero_point: bool = False,
) -> Problem:
    """A problem with the shape of the op's first one where none is given."""
    usual = KERNELS[op].problems[0]
    return Problem(
        num_tokens or usual.num_tokens, in_features or usual.in_features, group_size, zero_point
    )


def compile_problem(op: str, target: int, problem: Problem, config: Config | None = None) -> Census:
    """As `compile_op`, for a problem."""
    return censuses_of([binary_of(op, target, problem, config)])[0]


def binary_of(op: str, target: int, problem: Problem, config: Config | None = None) -> Binary:
    """Compile without counting; `machine_code.censuses_of` counts many kernels faster than one by one.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, or the compiler refuses this kernel.
    """
    refuse_the_interpreter()
    config = config or tuned_config(op, target, problem)
    source, options = _source(op, problem, config)
    with our_passes():
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return Binary(op, target, config, compiled.asm["cubin"], compiled.metadata.shared)


def digest(op: str, target: int, problem: Problem, config: Config) -> str:
    """What decides the machine code of a launch: nothing is compiled.

    Raises:
        RuntimeError: TRITON_INTERPRET is set.
    """
    refuse_the_interpreter()
    source, options = _source(op, problem, config)
    return digest_of(source, target, options)


def _source(op: str, problem: Problem, config: Config) -> tuple[Any, dict[str, Any]]:
    """What to compile, and with which options."""
    kernel, constants = KERNELS[op].specialize(op, problem, config)
    options = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    if not isinstance(config, tuning.RowConfig):
        options["num_stages"] = config.num_stages
    return source_of(kernel, constants, KERNELS[op].types), options


def refuse_the_interpreter() -> None:
    """Raises RuntimeError where TRITON_INTERPRET is set."""
    if INTERPRETED:
        raise RuntimeError("offline: unset TRITON_INTERPRET, an interpreted kernel has no machine code")


def tuned_config(op: str, target: int, problem: Problem) -> Config:
    """The launch of an op's problem on an architecture."""
    tables = offline_unserved.tables_of(target)
    found = KERNELS[op].tuned(op, tables, problem.num_tokens, problem.in_features)
    return offline_unserved.adapted(op, target, found)


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
