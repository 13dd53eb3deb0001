"""`ditq bench model`: a step and a run, with what cannot run here named."""

import json

import pytest
import torch
from typer.testing import CliRunner

from ditq_bench.cli import bench
from ditq_bench.model_command import FIELDS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_demo_model_on_a_cpu(tmp_path):
    arguments = ["model", "demo:digits", "--images", "1", "--steps", "2", "--budget", "0.01"]
    result = CliRunner().invoke(
        bench, [*arguments, "--modes", "eager,hoisted", "--out", str(tmp_path), "--json"]
    )
    assert result.exit_code == 0, result.output
    rows = {(row["what"], row["mode"]): row for row in json.loads(result.stdout)}
    whole = [("run", mode) for mode in ("eager", "hoisted")]
    assert list(rows) == [*whole, ("step", "eager")]
    step, run = rows["step", "eager"], rows["run", "eager"]
    assert 0 < step["p20_ms"] <= step["median_ms"] <= step["p80_ms"]
    assert run["median_ms"] > step["p20_ms"]  # a run is two steps and a decoder
    assert run["peak_bytes"] > 100 << 20
    assert "DiTTransformer2DModel" in rows["run", "hoisted"]["skipped"]  # a float model
    page = (tmp_path / "model.html").read_text()
    assert "demo:digits: 1 images, 2 steps" in page
    assert "spread, %" in page
    assert (tmp_path / "model.csv").read_text().splitlines()[0] == ",".join(FIELDS)


@pytest.mark.parametrize(
    "option",
    [("--modes", "lazy"), ("--modes", "eager,graph"), ("--dtype", "int8"), ("--size", "64")],
)
def test_misuse(option):
    result = CliRunner().invoke(bench, ["model", "demo:digits", *option])
    assert result.exit_code == 2
