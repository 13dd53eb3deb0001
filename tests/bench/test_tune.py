"""The tuner drops what the model rules out, times only right answers, and writes a table that is read back."""

import importlib
import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from ditq_bench.tune import run, space
from ditq_bench.tune.command import tune
from ditq_kernels.launch import tuning

CPU = torch.device("cpu")
# Triton 3.6's interpreter takes range() over one-element arrays, which numpy 2.4 will refuse
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")


@pytest.fixture(scope="module")
def app():
    app = typer.Typer()
    app.command("tune")(tune)
    return app


@pytest.mark.parametrize("target", [80, 86, 89, 90, 120])
def test_every_row_of_the_table_is_a_bucket_with_its_default_first(target):
    found = space.buckets(target, run.PROBLEMS)
    tables = tuning.tables_of_architecture(f"sm_{target}")
    of_op = [[tuning.load_table(name)["ops"].get(op) for name in tables] for op in run.PROBLEMS]
    rows = sum(len(next(filter(None, found))) for found in of_op)
    assert len(found) == rows
    for bucket in found:
        configs = space.launches(bucket, target)
        assert configs[0] == bucket.default
        assert len(configs) == len(set(configs))
        assert len(configs) > 4


def test_every_op_of_the_tables_can_be_tuned():
    for architecture in ("sm_80", "sm_89", "sm_90"):
        assert set(tuning.load_table(architecture)["ops"]) == set(run.PROBLEMS)


def test_variants_are_timed_where_a_program_could_have_two_tiles():
    few, _, many = (b for b in space.buckets(90, ["gemm_w8a8"]) if b.num_tokens in (16, 2048, 8192))
    assert space.variants(few, few.default, 90) == []
    for target, count in ((80, 2), (90, 8)):
        found = space.variants(many, many.default, target)
        assert len(found) == len(set(found)) == count
        assert all(c.split_k == 1 and c.block_t == many.default.block_t for c in found)


def test_no_row_kernel_holds_more_than_registers_can():
    """8 rows of 15360 in 2 warps are 2048 values a thread: ptxas took minutes for one."""
    for bucket in space.buckets(90, ["quantize_static"]):
        for config in space.launches(bucket, 90):
            assert config.rows * bucket.in_features <= 128 * 32 * config.num_warps


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


def test_a_spent_budget_stops_compiling(monkeypatch):
    (bucket,) = (b for b in space.buckets(80, ["gemm_w8a8"]) if not b.limits)
    made = []
    monkeypatch.setattr(
        space, "_census", lambda *problem: made.append(problem[-1]) or census(problem[-1])
    )
    steps = []
    assert space.prune(bucket, 80, lambda: steps.append(1), end=0.0) == [(bucket.default, None)]
    assert made == []
    assert len(steps) == len(space.launches(bucket, 80))


@pytest.mark.parametrize("op", sorted(run.PROBLEMS))
def test_launches_are_timed_and_written(op, tmp_path):
    """The interpreter runs them: what is timed is the product's own launch."""
    tables = ("interpreter",)
    find = tuning.row_config if "quantize" in op or op == "w4_expand" else tuning.tile_config
    if op.startswith("attention"):
        find = tuning.attention_config
    inputs = 64 if op.startswith("attention") else 128
    bucket = space.Bucket(op, {"max_tokens": 16}, 16, inputs, find(op, tables, 16, inputs), 32, 1)
    ((_, timed),) = run.tune([(bucket, [bucket.default])], CPU, budget=0.01)
    assert timed[0].config == bucket.default
    assert 0 < timed[0].p20 <= timed[0].median <= timed[0].p80
    run.write_table(tmp_path / "GPU.json", run.table_of([(bucket, timed)], "sm_80", "GPU"))
    table = json.loads((tmp_path / "GPU.json").read_text())
    said = {"parts": 2} if op.endswith("_epilogue") else {}
    first = dict(list(vars(bucket.default).items())[:5])
    assert table["ops"][op] == [{"max_tokens": 16} | first | said]
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


def test_a_launch_that_does_not_run_is_left_out():
    """TMA cannot read these rows, which the launch says."""
    default = tuning.TileConfig(32, 32, 64, 4, 2)
    bucket = space.Bucket("gemm_w8a8", {}, 16, 72, default, 32)
    by_tma = tuning.TileConfig(32, 32, 64, 4, 2, loads="tma")
    reasons = []
    ((_, timed),) = run.tune([(bucket, [default, by_tma])], CPU, 0.01, reasons.append)
    assert [t.config for t in timed] == [default]
    (reason,) = reasons
    assert "TMA needs rows" in reason


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
    assert len(report["launches"]) == report["tried"] + 2 * 2 > 30  # two rows with variants


@pytest.mark.parametrize("option", [("--ops", "gemm_w2"), ("--target", "75", "--dry-run")])
def test_misuse(app, option):
    result = CliRunner().invoke(app, ["--dry-run", *option])
    assert result.exit_code == 2
