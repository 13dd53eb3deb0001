"""Machine code of the default launches, compiled without a GPU: what makes them fast stays.

Counts are instructions per warp of one hot-loop iteration; budgets are those of `ditq bench census`. An
earlier study of bare probe kernels (no int64 offsets, no metadata pipeline) counted 142 for W8A8 128x128x64
on sm_80, 119 for 128x256x128 on sm_90. With operands in the wrong layout it counted 386 and 334; with a W4A8
unpack in plain Triton 3024.
"""

import json
import os

import pytest

from ditq_bench.census import gate

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
QUANTIZE_BUDGET = 600  # whole kernel, 4 rows of 1152 by 4 warps: a padded row of 2048 needs 1700


@pytest.fixture(scope="module", params=[80, 89, 90])
def censuses(request, python_without_interpreter):
    """Census of each op for one target, from one process without the interpreter."""
    program = (
        "import dataclasses, json; from ditq_kernels._triton.offline import compile as offline;"
        "ops = ('quantize_per_token', 'quantize_static', 'gemm_w8a8', 'gemm_w4a8', 'gemm_w4a8_per_group');"
        f"found = offline.compile_ops({request.param}, [(op, {{}}) for op in ops]);"
        "print(json.dumps({c.op: dataclasses.asdict(c) for c in found}))"
    )
    return request.param, json.loads(python_without_interpreter("-c", program))


def test_nothing_spills(censuses):
    target, found = censuses
    for census in found.values():
        assert (census["stack"], census["spills"]) == (0, 0), census["op"]
        assert census["registers"] <= 255
        assert census["shared"] <= SHARED_LIMIT[target]


GEMMS = ["gemm_w8a8", "gemm_w4a8", "gemm_w4a8_per_group"]


@pytest.mark.parametrize("op", GEMMS)
def test_gemms_run_on_int8_tensor_cores(censuses, op):
    target, found = censuses
    opcode = "IGMMA" if target == 90 else "IMMA"
    assert found[op]["loop"][opcode] >= (2 if op == "gemm_w4a8_per_group" else 4)  # of 64 inputs
    assert all(name.startswith(opcode) and "S8.S8" in name for name in found[op]["mma"])
    # loads are asynchronous
    assert found[op]["loop"]["LDGSTS"] >= (3 if op == "gemm_w4a8_per_group" else 4)


def test_expanded_weights_stay_in_registers(censuses):
    target, found = censuses
    products = found["gemm_w4a8"]["loop"].get("IGMMA", 0)
    assert found["gemm_w4a8"]["register_operands"] == products
    assert found["gemm_w8a8"]["register_operands"] == 0
    assert (products > 0) == (target == 90)


@pytest.mark.parametrize("op", GEMMS)
def test_hot_loops_stay_lean(censuses, op):
    target, found = censuses
    loop = found[op]["loop"]
    assert not {"F2I", "I2F", "I2FP", "LDL", "STL"} & set(loop)
    # byte permutations of the group words of a thread, which stand where the file has them: two a row and half unit
    assert loop.get("PRMT", 0) <= {"gemm_w4a8": 8, "gemm_w4a8_per_group": 2}.get(op, 0)
    # scales and offsets of groups are read where the file has them, too narrow for asynchronous copies
    assert loop.get("LDG", 0) <= {"gemm_w4a8": 8, "gemm_w4a8_per_group": 4}.get(op, 0)
    (allowed,) = gate.load_budget()["instructions"][op][str(target)].values()
    assert sum(loop.values()) <= allowed, loop


@pytest.mark.parametrize("op", GEMMS)
def test_epilogues_do_not_fuse_multiply_and_add(censuses, op):
    _, found = censuses
    assert "FFMA" not in found[op]["whole"]
    assert found[op]["whole"]["FADD"] >= 16  # the bias


@pytest.mark.parametrize("target", [80, 89, 90])
def test_real_groups_of_every_common_size_stay_in_registers(target, python_without_interpreter):
    """Of 128, 64 and (in pairs) 32 inputs, symmetric activations and calibrated ones, as formats run them."""
    program = (
        "import dataclasses, json; from ditq_kernels._triton.offline.compile import compile_ops;"
        "cases = [dict(group_size=s, zero_point=z) for s in (32, 64, 128) for z in (False, True)];"
        f"found = compile_ops({target}, [('gemm_w4a8_per_group', case) for case in cases]);"
        "print(json.dumps([dataclasses.asdict(c) for c in found]))"
    )
    for census in json.loads(python_without_interpreter("-c", program)):
        assert (census["stack"], census["spills"]) == (0, 0)
        assert census["shared"] <= SHARED_LIMIT[target]
        assert not {"I2F", "I2FP"} & set(census["loop"])  # the sum is read as fp32
        assert census["loop"].get("PRMT", 0) <= 4  # of the words of real groups
        assert "FFMA" not in census["whole"]


@pytest.mark.parametrize("op", ["quantize_per_token", "quantize_static"])
def test_quantizers_round_without_conversions(censuses, op):
    _, found = censuses
    whole = found[op]["whole"]
    assert "F2I" not in whole
    assert "FFMA" in whole or "MUFU" in whole  # the correctly rounded division
    assert sum(whole.values()) <= QUANTIZE_BUDGET


def test_command_prints_json(python_without_interpreter):
    out = python_without_interpreter(
        "-m",
        "ditq_kernels._triton.offline.compile",
        "--op",
        "quantize_static",
        "--target",
        "90",
        "--json",
    )
    census = json.loads(out)
    assert (census["op"], census["target"], census["loop_instructions"]) == (
        "quantize_static",
        90,
        0,
    )


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton is compiled here")
def test_interpreted_kernels_have_no_machine_code():
    from ditq_kernels._triton.offline import compile as offline

    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        offline.compile_op("gemm_w8a8", 90)
