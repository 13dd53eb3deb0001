"""Launches of all ops through Triton's launcher, without a GPU: `make census` makes all, here a few, and what fails."""

import json

import pytest
import torch

from ditq_bench.census import launched
from ditq_bench.census.options import options
from ditq_bench.host.cases import ODD, calls
from ditq_kernels.launch import tuning
from ditq_kernels.ops.library import OPS

PROGRAM = """
import json, torch
from ditq_bench.census import launched
from ditq_kernels._triton.offline import stub
from ditq_kernels._triton import quantize_static
from ditq_kernels.launch import tuning

stub.install(89)
launches = launched.Launches()
shapes = [(launched.ODD, ("quantize_static", "quantize_heads", "w4_expand"))]
with torch.no_grad():
    report = {"faults": list(launched.faults(launches, shapes)), "launches": launches.count}
    report["rows"] = sorted({op for op, _ in launches.rows})
    deep = {"block_t": 64, "block_n": 128, "block_k": 128, "num_warps": 4, "num_stages": 6}
    tuning._fitting_row = lambda *shape: deep
    shapes = [(launched.Shape(1, 64, 1152, 1, 128), ("gemm_w8a8",))]
    report["deep"] = list(launched.faults(launches, shapes))
    quantize_static.triton.cdiv, cdiv = lambda *sizes: 0, quantize_static.triton.cdiv
    tuning._fitting_row = lambda *shape: {"rows": 4, "num_warps": 4}
    shapes = [(launched.Shape(1, 64, 128, 1, 64), ("quantize_static",))]
    report["empty"] = list(launched.faults(launches, shapes))
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(python_without_interpreter):
    return json.loads(python_without_interpreter("-c", PROGRAM))


def test_calls_are_launched_twice_and_rows_of_tables_are_noted(report):
    assert report["faults"] == []
    assert report["launches"] == 2 * 6
    assert report["rows"] == ["quantize_static", "w4_expand"]


def test_a_launch_that_needs_more_shared_memory_than_there_is_fails(report):
    """6 stages hold 5 tiles of (64 + 128) * 128 bytes, 120 KiB; an sm_89 program has at most 99."""
    assert len(report["deep"]) == 2
    assert all(
        "OutOfResources: out of resource: shared memory" in fault for fault in report["deep"]
    )


def test_an_empty_grid_fails(report):
    assert report["empty"]
    assert all(
        "launches of two calls" in fault or "a grid of (0, 1, 1)" in fault
        for fault in report["empty"]
    )


@pytest.mark.parametrize("target", [80, 86, 89, 90, 120])
def test_rows_are_those_that_calls_meet(target):
    """Each op's, of the first table that has it."""
    rows = list(launched.rows_of(target))
    tables = tuning.tables_of_architecture(f"sm_{target}")
    assert {op for op, _ in rows} == {
        op for name in tables for op in tuning.load_table(name)["ops"]
    }
    row = tuning.row_config("quantize_static", tables, 8192, 128)
    assert ("quantize_static", tuple(vars(row).items())) in rows


def test_there_is_a_call_of_every_op_with_few_options_and_with_many():
    device = torch.device("cpu")
    for made, left_out in (
        (calls(device), {"linear_w4_per_group"}),
        (
            options(device, ODD),
            {"linear_w4_per_group", "linear_w8", "linear_w4", "lora_down", "w4_expand"},
        ),
    ):
        assert {name.partition(",")[0] for name in made} == set(OPS) - left_out


@pytest.mark.parametrize("name", options(torch.device("cpu"), ODD))
def test_calls_with_options_are_calls_of_the_reference(name):
    result = options(torch.device("cpu"), ODD)[name]()
    parts = result if isinstance(result, tuple) else (result,)
    assert all(part.float().isfinite().all() for part in parts if part is not None)
