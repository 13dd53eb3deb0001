"""Launches from known sources are not compiled, but for a sample; what changes a kernel's code changes its digest."""

import json

import pytest

from ditq_bench.census import gate, known, taken
from ditq_bench.census.issue_model import predict
from ditq_bench.census.rows import CensusRow, KnownRow

PROBE = """
import dataclasses, json, sys
from triton import language as tl
from triton.runtime.jit import JITCallable
from ditq_bench.census import known, rows
from ditq_kernels._triton.offline import compile as offline, digest
from ditq_kernels._triton.parts import common

found = rows.cases(rows.kernel_names(), (90,), usual_only=True)
modules = [m for name, m in sys.modules.items() if name.startswith("ditq_kernels")]
functions = {f for m in modules for f in vars(m).values() if isinstance(f, JITCallable)}

def missed(case):
    # what Triton's own cache key visits, and the digest does not
    for function in functions:
        function.hash = None
    kernel, _ = offline.KERNELS[case[0]].specialize(case[0], *case[2:])
    kernel.cache_key
    reached = {name for name, _ in digest.reached_by(kernel)}
    visited = {f"{f.__module__}.{f.__qualname__}" for f in functions if f.hash is not None}
    ends = {name.rpartition(".")[2] for name in reached}
    return sorted(visited - reached) + sorted({name for name, _ in kernel.used_global_vals} - ends)

def digests():
    digest.reached_by.cache_clear()
    return [known.digest_of(case) for case in found]

before = digests()

def changed():
    return [case[0] for case, old, new in zip(found, before, digests()) if old != new]

report = {"missed": {case[0]: missed(case) for case in found}, "repeated": changed()}
source = common.rounded_steps._src
common.rounded_steps._src = source.replace("    y = ", "    # a comment\\n\\n    y = ")
report["comment"] = changed()
common.rounded_steps._src = source.replace("0x4B400000", "0x4B400001")
report["function"] = changed()
common.rounded_steps._src = source
constant, common.GELU_LINEAR = common.GELU_LINEAR, tl.constexpr(1.0)
report["constant"] = changed()
common.GELU_LINEAR = constant
wider = [(*case[:3], dataclasses.replace(case[3], num_warps=2 * case[3].num_warps)) for case in found]
report["launch"] = [case[0] for case, old in zip(wider, before) if known.digest_of(case) == old]
report["kernels"] = sorted({case[0] for case in found})
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def probe(python_without_interpreter):
    return json.loads(python_without_interpreter("-c", PROBE))


def test_a_digest_covers_what_tritons_own_key_does(probe):
    assert len(probe["missed"]) == len(probe["kernels"]) > 50
    assert not any(probe["missed"].values())


def test_a_digest_changes_with_functions_constants_and_launches_and_nothing_else(probe):
    assert probe["repeated"] == probe["comment"] == probe["launch"] == []
    assert {name for name in probe["kernels"] if "quantize" in name} < set(probe["function"])
    assert not {"transpose_v", "w4_expand", "linear_w8"} & set(probe["function"])
    assert {"gelu_quantize_static", "gemm_w8a8+gelu_quantize"} < set(probe["constant"])
    assert not {"transpose_v", "attention_qk_int8_pv_bf16+strict"} & set(probe["constant"])


def row(target=80, registers=100):
    """Of a copy: 18 instructions."""
    whole = {"LDG": 8, "STG": 10}
    census = {
        "op": "transpose_v", "target": target, "registers": registers, "stack": 0, "spills": 0, "shared": 1024,
        "config": {"rows": 4, "num_warps": 4}, "mma": {}, "loop": {}, "whole": whole, "loop_opcodes": {},
        "whole_opcodes": whole, "register_operands": 0,
    }  # fmt: skip
    return CensusRow({"num_tokens": 8192, "in_features": 1152}, census, predict(census))


def budget_of(found, slack=0):
    return {found.kernel: {str(found.target): {found.case: found.instructions + slack}}}


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(taken, "triton_version", lambda: "3.6.0")
    return tmp_path / "census.csv"


def test_what_is_known_is_not_compiled_unless_it_changed_or_is_drawn(monkeypatch, table):
    cases = ["same", "changed", "drawn", "new"]
    rows = {case: row(registers=10 + i) for i, case in enumerate(cases)}
    known.write(table, "3.6.0", "c", [], [(case, rows[case]) for case in cases[:3]])
    compiled = []

    def census_rows(found, advance):
        compiled.extend(found)
        return [rows[case] for case in found]

    monkeypatch.setattr(taken, "census_rows", census_rows)
    monkeypatch.setattr(known, "sampled", lambda digest, commit: digest == "drawn")
    monkeypatch.setattr(known, "digest_of", lambda case: {"changed": "by now"}.get(case, case))
    found = taken.take(cases, table)
    assert compiled == ["changed", "drawn", "new"]
    assert [(one.text["digest"], one.kernel) for one in found.kept] == [("same", "transpose_v")]
    assert len(found.rows) == 4
    compiled.clear()
    assert taken.take(cases, None).kept == []
    assert compiled == cases


def test_other_counts_from_the_same_sources_are_a_fault(monkeypatch, table):
    found = row()
    monkeypatch.setattr(gate, "load_budget", lambda: {"instructions": budget_of(found)})
    known.write(table, "3.6.0", "c", [], [("other", row(registers=99)), ("same", found)])
    (wrong,) = taken.faults(taken.Taken([("other", found)], [], []), table)
    assert wrong.endswith("registers 100, known 99, from the same sources")
    for digest in ("same", "new"):
        assert taken.faults(taken.Taken([(digest, found)], [], []), table) == []


def test_a_row_with_a_fault_is_not_known_from_now_on(monkeypatch, table):
    spills = row()
    spills.census["spills"] = 2
    monkeypatch.setattr(gate, "load_budget", lambda: {"instructions": budget_of(spills)})
    taken.write_known(taken.Taken([("spills", spills), ("sound", row())], [], []), table)
    assert set(known.load(table, "3.6.0")) == {"sound"}


def test_a_smaller_budget_holds_for_what_is_not_compiled():
    found = row()
    text = {name: "" if value is None else str(value) for name, value in found.fields().items()}
    assert gate.known_faults(KnownRow(text), budget_of(found)) == []
    (wrong,) = gate.known_faults(KnownRow(text), budget_of(found, slack=-1))
    assert wrong == f"transpose_v on sm_80 ({found.case}): 18 instructions, budget 17"


def test_every_launch_is_drawn_once_in_a_while():
    """At one of 16 commits: 62.5 of 1000, and 39 to 86 within three standard deviations, which are 7.7."""
    first, again, other = (
        [known.sampled(digest, f"commit {i}") for i in range(1000)] for digest in "dde"
    )
    assert 39 <= sum(first) <= 86
    assert first == again != other


def test_a_table_keeps_other_releases_and_the_commits_of_what_did_not_change(table):
    known.write(table, "3.9.0", "a", [], [("newest", row())])
    known.write(table, "3.6.0", "a", [], [("old", row()), ("gone", row(target=90))])
    old = known.load(table, "3.6.0")["old"]
    known.write(table, "3.6.0", "b", [], [("old", row()), ("other", row(target=90))])
    assert set(known.load(table, "3.9.0")) == {"newest"}
    found = known.load(table, "3.6.0")
    assert set(found) == {"old", "other"}
    assert found["old"] == old
    assert [found[name].text["commit"] for name in ("old", "other")] == ["a", "b"]
