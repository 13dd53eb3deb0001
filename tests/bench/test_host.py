"""`ditq bench host`: ratios by both ways to call, in rows that say through what they were measured."""

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from ditq_bench.cli import bench
from ditq_bench.host import cases, measure
from ditq_kernels.launch import plans

CPU = torch.device("cpu")


@pytest.fixture
def few_calls(monkeypatch):
    """Two ops, few rounds, no driver: the CPU's own implementations."""
    found = {name: cases.calls(CPU)[name] for name in ("quantize_static", "gemm_w8a8")}
    monkeypatch.setattr(measure, "calls", lambda device: found)
    monkeypatch.setattr(measure, "CALLS", 20)
    monkeypatch.setattr("ditq_kernels._triton.offline.stub.install", lambda target: None)
    plans.clear()


@pytest.mark.usefixtures("few_calls")
def test_the_dispatcher_costs_more_than_a_plan(monkeypatch):
    monkeypatch.setattr(measure, "CALLS", 200)
    for cost in measure.host_costs(CPU, lambda: None, rounds=5):
        assert 0 < cost.direct < cost.dispatcher


@pytest.mark.usefixtures("few_calls")
def test_the_command_says_through_what_it_measured(tmp_path):
    path = tmp_path / "host.csv"
    result = CliRunner().invoke(bench, ["host", "--rounds", "1", "--json", "--out", str(path)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["call"] for row in report["rows"]] == ["quantize_static", "gemm_w8a8"]
    assert report["through"].endswith("no GPU, sm_90")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["call"] for row in rows] == ["quantize_static", "gemm_w8a8"]
    assert all(row["torch"] == torch.__version__ and row["commit"] for row in rows)
