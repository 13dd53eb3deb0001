"""The census gate holds for the kernels as they are, and each of its conditions can fail."""

import copy
import dataclasses
import json

import pytest
from typer.testing import CliRunner

from ditq_bench.census import gate
from ditq_bench.census.issue_model import predict
from ditq_bench.census.rows import FIELDS, CensusRow
from ditq_bench.cli import bench
from ditq_kernels._triton.offline import compile as offline

PRODUCTS = {90: "IGMMA.64x128x32.S8.S8", 100: "UTCIMMA"}
COMMAND = "from ditq_bench.cli import bench; bench()"


def row(op="gemm_w8a8", target=80, **changes):
    """A sound row: products and additions, as a disassembled kernel gives them."""
    product = PRODUCTS.get(target, "IMMA.16832.S8.S8.SAT")
    loop = {product: 8, "IADD3": 10}
    census = {
        "op": op, "target": target, "registers": 100, "stack": 0, "spills": 0, "shared": 1024,
        "config": {"block_t": 128, "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 3},
        "mma": {product: 8}, "loop": {name.split(".")[0]: n for name, n in loop.items()},
        "whole": {}, "loop_opcodes": loop, "whole_opcodes": loop,
        "register_operands": 8 if target in PRODUCTS and "w4" in op else 0,
    }  # fmt: skip
    census |= changes
    return CensusRow({"num_tokens": 8192, "in_features": 1152}, census, predict(census))


def budget_of(found, slack=0):
    census = found.census
    cases = {found.case: found.instructions + slack}
    return {census["op"]: {str(census["target"]): cases}}


@pytest.mark.parametrize("target", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("op", ["gemm_w8a8", "gemm_w4a8", "attention_qk_int8_pv_bf16"])
def test_a_sound_row_passes(op, target):
    found = row(op, target)
    assert gate.faults(found, budget_of(found)) == []


@pytest.mark.parametrize(
    ("op", "target", "changes", "fault"),
    [
        ("gemm_w8a8", 80, {"spills": 3}, "spills: 3 local memory"),
        ("quantize_static", 89, {"stack": 32}, "32 bytes a thread"),
        ("gemm_w8a8", 80, {"mma": {}}, "no IMMA on int8, but no tensor cores"),
        ("gemm_w4a8", 89, {"mma": {"HMMA.16816.F32.BF16": 8}}, "no IMMA on int8, but {'HMMA"),
        ("gemm_w8a8", 90, {"mma": {"IMMA.16832.S8.S8.SAT": 8}}, "no IGMMA on int8"),
        ("gemm_w8a8", 80, {"loop": {"IMMA": 8, "F2I": 1}}, "F2I in the hot loop"),
        ("gemm_w8a8", 89, {"loop": {"IMMA": 8, "PRMT": 1}}, "PRMT in the hot loop"),
        ("gemm_w4a8", 90, {"register_operands": 7}, "registers: 7 of 8 products"),
        ("gemm_w4a8", 100, {"register_operands": 0}, "registers: 0 of 8 products"),
        ("attention_qk_int8_pv_int8", 90, {"mma": {}}, "no IGMMA"),
        ("gemm_w8a8", 100, {"mma": {"IMMA.16832.S8.S8.SAT": 8}}, "no UTCIMMA on int8, but {'IMMA"),
        (
            "gemm_w8a8+residual",
            90,
            {"shared": 120_000},
            "one program fits on a multiprocessor, kept alone by shared",
        ),
    ],
)
def test_each_condition_can_fail(op, target, changes, fault):
    found = row(op, target, **changes)
    wrong = gate.faults(found, budget_of(found))
    assert len(wrong) == 1
    assert fault in wrong[0]
    assert f"{op} on sm_{target} (8192 x 1152: 128x128x64, 4 warps, 3 stages)" in wrong[0]


def test_a_longer_loop_is_over_budget():
    found = row()
    (wrong,) = gate.faults(found, budget_of(found, slack=-1))
    assert wrong.endswith("18 instructions, budget 17")
    assert gate.faults(found, budget_of(found, slack=1)) == []


def test_an_unbudgeted_launch_is_a_fault():
    (wrong,) = gate.faults(row(), {})
    assert "no budget" in wrong


def test_budgets_grow_and_forget_old_launches(tmp_path):
    path = tmp_path / "budget.json"
    found = row()
    gate.update_budget([found], "3.6.0", path)
    shorter = copy.deepcopy(found)
    shorter.census["loop"]["IADD3"] = 1
    gate.update_budget([shorter, row(target=90)], "3.9.0", path)
    stored = gate.load_budget(path)
    assert stored["triton"] == ["3.6.0", "3.9.0"]
    assert stored["instructions"]["gemm_w8a8"]["80"] == {found.case: 18}
    assert set(stored["instructions"]["gemm_w8a8"]) == {"80", "90"}
    moved = copy.deepcopy(found)
    moved.census["config"]["num_stages"] = 4
    gate.update_budget([moved], "3.9.0", path)
    assert list(gate.load_budget(path)["instructions"]["gemm_w8a8"]["80"]) == [moved.case]


def test_what_is_printed_of_a_row():
    fields = row().fields()
    assert tuple(fields) == FIELDS
    assert fields["launch"] == "128x128x64, 4 warps, 3 stages"
    assert (fields["instructions"], fields["products"], fields["others_per_product"]) == (
        18,
        8,
        1.25,
    )
    assert dataclasses.replace(row(), problem=row().problem).fields() == fields


def test_the_gate_is_green_for_the_gemms(python_without_interpreter, tmp_path):
    """The fast part; `make census` runs all kernels on all architectures."""
    table = tmp_path / "census.csv"
    arguments = ("--kernel", "gemm_w8a8,gemm_w4a8", "--target", "80,89,90", "--out", str(table))
    printed = python_without_interpreter("-c", COMMAND, "census", "--check", "--json", *arguments)
    report = json.loads(printed)
    assert report["faults"] == []
    assert len(report["rows"]) == 6
    assert all(0.1 < found["issue_share"] < 0.6 for found in report["rows"])
    assert len(table.read_text().splitlines()) == 7


BOTH_DISASSEMBLERS = """
import collections, json, re
from ditq_kernels._triton.offline import machine_code
from ditq_kernels._triton.offline import compile as offline
cases = [("quantize_static", 80), ("gemm_w8a8", 90), ("w4_expand", 80), ("transpose_v", 90)]
made = [offline.binary_of(op, target, *offline.tuned_problems(op, target)[0]) for op, target in cases]
def alone(binary):
    text = machine_code._run("cuobjdump", "-sass", contents=binary.cubin)
    names = re.findall(r"/[*][0-9a-f]{4}[*]/ +(?:@!?U?P[0-9T]+ +)?([A-Z0-9]+)", text)
    return collections.Counter(names)
together = [each.whole for each in machine_code.censuses_of(made)]
print(json.dumps([[whole, alone(binary)] for whole, binary in zip(together, made)]))
"""

PLAIN_UNPACK = """
import dataclasses
from ditq_kernels._triton.offline import compile as offline
entry = offline.KERNELS["gemm_w4a8"]
def plain(*arguments):
    kernel, constants = entry.specialize(*arguments)
    return kernel, constants | {"INLINE_ASM": False}
offline.KERNELS["gemm_w4a8"] = dataclasses.replace(entry, specialize=plain)
"""


def test_a_real_slow_kernel_fails_the_command(python_without_interpreter):
    """Weights expanded in plain Triton instead of four at a time."""
    arguments = ("census", "--check", "--kernel", "gemm_w4a8", "--target", "80")
    printed = python_without_interpreter("-c", PLAIN_UNPACK + COMMAND, *arguments, expected=1)
    assert "instructions, budget" in printed
    assert "1 kernels checked on sm_80, 1 faults" in printed


def test_a_kernel_that_does_not_compile_is_a_fault(monkeypatch):
    def refuse(*case):
        raise ValueError("no such layout\nand much more")

    monkeypatch.setattr(offline, "binary_of", refuse)
    monkeypatch.setattr(offline, "refuse_the_interpreter", lambda: None)
    arguments = ["census", "--kernel", "transpose_v", "--target", "100"]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0
    reason = "does not compile: ValueError: no such layout\n"
    assert "transpose_v on sm_100 (128, 4 warps) " + reason in result.output
    result = CliRunner().invoke(bench, [*arguments, "--check"])
    assert result.exit_code == 1
    assert "1 kernels checked on sm_100, 1 faults" in result.output


def test_counts_are_those_of_the_other_disassembler(python_without_interpreter):
    """Kernels go through nvdisasm together, without their files; cuobjdump reads one whole file."""
    printed = python_without_interpreter("-c", BOTH_DISASSEMBLERS)
    for together, alone in json.loads(printed):
        assert sum(together.values()) > 100
        assert together == alone


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kernel", "gemm_w2"), "choose from"),
        (("--target", "75"), "choose from"),
        (("--known", "t.csv"), "known counts are for"),
        (("--check", "--update-known"), "--update-known: which table?"),
    ],
)
def test_misuse_is_refused(options, said):
    result = CliRunner().invoke(bench, ["census", *options])
    assert result.exit_code == 2
    assert said in result.output
