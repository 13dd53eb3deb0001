"""`ditq bench host`: ratios by both ways to call, in rows that say through what they were measured."""

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

import ditq_runtime as ditq
from ditq_bench.cli import bench
from ditq_bench.host import cases, measure, models
from ditq_bench.launches import Launches
from ditq_kernels.launch import plans

CPU = torch.device("cpu")


@pytest.fixture
def few_calls(monkeypatch):
    """Two ops, few rounds, no driver: the CPU's own implementations."""
    found = {name: cases.calls(CPU)[name] for name in ("quantize_static", "gemm_w8a8")}
    monkeypatch.setattr(cases, "calls", lambda device: found)
    monkeypatch.setattr(measure, "CALLS", 20)
    monkeypatch.setattr("ditq_kernels._triton.offline.stub.install", lambda target: None)
    plans.clear()


@pytest.mark.usefixtures("few_calls")
def test_the_dispatcher_costs_more_than_a_plan(monkeypatch):
    monkeypatch.setattr(measure, "CALLS", 200)
    for cost in measure.host_costs(CPU, cases.calls(CPU), lambda: None, rounds=5):
        assert 0 < cost.direct < cost.dispatcher


@pytest.mark.usefixtures("few_calls")
def test_the_command_says_through_what_it_measured(tmp_path):
    path = tmp_path / "host.csv"
    result = CliRunner().invoke(
        bench, ["host", "--rounds", "2", "--no-models", "--json", "--out", str(path)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["call"] for row in report["rows"]] == ["quantize_static", "gemm_w8a8"]
    assert report["through"].endswith("no GPU, sm_90")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["call"] for row in rows] == ["quantize_static", "gemm_w8a8"]
    assert all(row["torch"] == torch.__version__ and row["commit"] for row in rows)


def test_blocks_and_steps_are_those_of_fused_models(monkeypatch):
    monkeypatch.setattr("ditq_runtime.speed.cuda_graph._record", None)
    made = models.packed(("w8",), layers=2)
    found = models.steps(made, CPU)
    names = ("DiT block, w8 static", "DiT-XL/2 step, w8 static", "DiT-XL/2 step, CUDA graph")
    assert tuple(found) == names
    with torch.no_grad():
        for step in found.values():
            step()
    report = ditq.execution_report(made["w8"], models.dit_inputs(CPU))
    assert report.totals["fused_blocks"] == 2
    assert {row.op for row in report.attention} == {"attention_qk_int8_pv_int8"}


def test_a_norm_of_heads_counts_as_one_operator():
    """Elsewhere torch's own is back, also after an error."""
    own, norm, x = torch.rms_norm, torch.nn.RMSNorm(8), torch.ones(2, 8)

    def call():
        assert torch.rms_norm is not own
        with Launches() as counted:
            torch.rms_norm(x, norm.normalized_shape, norm.weight, 1e-6)
        return counted.ops

    assert models.with_one_operator(call)() == {"aten.native_layer_norm": 1}
    with pytest.raises(ZeroDivisionError):
        models.with_one_operator(lambda: 1 // 0)()
    assert torch.rms_norm is own
