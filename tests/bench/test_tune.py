"""The tuner drops what the model rules out, times only right answers, and writes a table that is read back."""

import importlib
import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from ditq_bench.tune import run, space
from ditq_bench.tune.command import tune
from ditq_kernels import tuning

CPU = torch.device("cpu")
# Triton 3.6's interpreter takes range() over one-element arrays, which numpy 2.4 will refuse
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")


@pytest.fixture(scope="module")
def app():
    app = typer.Typer()
    app.command("tune")(tune)
    return app


@pytest.mark.parametrize("target", [80, 86, 89, 90])
def test_every_row_of_the_table_is_a_bucket_with_its_default_first(target):
    found = space.buckets(target, run.PROBLEMS)
    tables = tuning.tables_of_architecture(f"sm_{target}")
    rows = sum(len(tuning.load_table(tables[0])["ops"][op]) for op in run.PROBLEMS)
    assert len(found) == rows
    for bucket in found:
        configs = space.launches(bucket, target)
        assert configs[0] == bucket.default
        assert len(configs) == len(set(configs))
        assert len(configs) > 4


def test_what_cannot_fit_is_never_compiled():
    (bucket,) = (b for b in space.buckets(89, ["gemm_w8a8"]) if not b.limits)
    for config in space.launches(bucket, 89):
        shared = config.num_stages * (config.block_t + config.block_n) * config.block_k
        assert shared <= 99 << 10
        assert config.block_t * config.block_n <= 128 * 32 * config.num_warps


def census(config, spills=0, instructions=100):
    loop = {"IMMA.16832.S8.S8.SAT": 64, "IADD3": instructions}
    return {
        "target": 80, "config": vars(config), "registers": 100, "shared": 1024, "spills": spills,
        "loop": loop, "loop_opcodes": loop, "whole_opcodes": loop,
    }  # fmt: skip


def test_spills_and_long_loops_are_pruned_but_the_default_stays(monkeypatch):
    (bucket,) = (b for b in space.buckets(80, ["gemm_w8a8"]) if not b.limits)
    one, other, third = [c for c in space.launches(bucket, 80) if c != bucket.default][:3]
    made = {
        bucket.default: census(bucket.default, spills=9, instructions=100_000),
        one: census(one),
        other: census(other, spills=1),
        third: census(third, instructions=100_000),
    }
    monkeypatch.setattr(space, "launches", lambda *_: list(made))
    monkeypatch.setattr(space, "_census", lambda op, target, tokens, inputs, config: made[config])
    kept = space.prune(bucket, 80)
    assert [config for config, _ in kept] == [one, bucket.default]
    assert kept[0][1] < kept[1][1]


def test_predicted_seconds_of_a_known_launch():
    """One wave of an A100: 128 x 128 tiles of 1024 tokens and 4608 outputs are 288 programs, three waves of 108."""
    config = tuning.TileConfig(128, 128, 64, 4, 3)
    bucket = space.Bucket("gemm_w8a8", {}, 1024, 1152, config)
    found = census(config, instructions=0)
    assert space.seconds(bucket, found) == pytest.approx(3 * 18 * 512 / 1.41e9)


@pytest.mark.parametrize("op", sorted(run.PROBLEMS))
def test_launches_are_timed_and_written(op, tmp_path):
    """The interpreter runs them: what is timed is the product's own launch."""
    tables = ("interpreter",)
    lookup = {"quantize": tuning.row_config, "gemm": tuning.tile_config}
    find = lookup.get(op.split("_")[0], tuning.attention_config)
    inputs = 64 if op.startswith("attention") else 128
    bucket = space.Bucket(op, {"max_tokens": 16}, 16, inputs, find(op, tables, 16, inputs), 32, 1)
    ((_, timed),) = run.tune([(bucket, [bucket.default])], CPU, budget=10.0)
    assert timed[0].config == bucket.default
    assert 0 < timed[0].p20 <= timed[0].median <= timed[0].p80
    run.write_table(tmp_path / "GPU.json", run.table_of([(bucket, timed)], "sm_80", "GPU"))
    table = json.loads((tmp_path / "GPU.json").read_text())
    assert table["ops"][op] == [{"max_tokens": 16} | vars(bucket.default)]
    assert "timed" in table["provenance"]


def test_a_launch_with_another_result_is_refused(monkeypatch):
    kernel = importlib.import_module("ditq_kernels._triton.gemm_w8a8")
    right = kernel.launch
    wrong = tuning.TileConfig(16, 32, 64, 4, 2)

    def launch(*arguments, config):
        return right(*arguments, config=config) + (config == wrong)

    monkeypatch.setattr(kernel, "launch", launch)
    bucket = space.Bucket("gemm_w8a8", {}, 16, 128, tuning.TileConfig(32, 32, 64, 4, 2), 32)
    with pytest.raises(RuntimeError, match=r"tune: gemm_w8a8 with .* differs from"):
        run.time_launches(bucket, [bucket.default, wrong], CPU, budget=0.0)


def test_a_spent_budget_stops_the_tuner():
    bucket = space.Bucket("quantize_static", {}, 16, 128, tuning.RowConfig(4, 4))
    assert list(run.tune([(bucket, [bucket.default])], CPU, budget=0.0)) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(app):
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert str(result.exception).startswith("tune: needs an NVIDIA GPU and found none")


def test_a_dry_run_lists_launches(app):
    arguments = ["--dry-run", "--no-prune", "--ops", "gemm_w8a8", "--target", "89", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["target"] == 89
    assert report["tried"] == len(report["launches"]) > 50


@pytest.mark.parametrize("option", [("--ops", "gemm_w2"), ("--target", "75", "--dry-run")])
def test_misuse(app, option):
    result = CliRunner().invoke(app, ["--dry-run", *option])
    assert result.exit_code == 2
