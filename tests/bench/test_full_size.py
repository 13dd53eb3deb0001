"""The full-size run at a tiny size: its model, its stages one by one, its tables."""

import csv
import json

import pytest
import torch
from diffusers import DiTPipeline
from typer.testing import CliRunner

from ditq_bench import full_size, full_size_report
from ditq_bench.cli import bench
from ditq_bench.xl_model import build, random_tensor
from ditq_runtime.families import family_of
from ditq_runtime.host.skeleton import has_shared_embedder

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
TINY_VAE = {
    "block_out_channels": (4,), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
    "sample_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full_size") / "float"
    build(folder, TINY, TINY_VAE)
    return folder


def test_the_model_is_a_pipeline_with_equal_embedders_and_different_blocks(model):
    transformer = DiTPipeline.from_pretrained(model).transformer
    assert has_shared_embedder(transformer, family_of("DiTTransformer2DModel"))
    first, second = (block.attn1.to_q.weight for block in transformer.transformer_blocks)
    assert not torch.equal(first, second)
    spread = float(transformer.proj_out_1.weight.detach().std()) * 64**0.5
    assert 0.45 < spread < 0.55  # 8192 draws: the standard error is 0.004


def test_a_tensor_depends_on_its_name_alone():
    first = random_tensor("transformer_blocks.3.attn1.to_q.weight", (8, 16))
    assert torch.equal(first, random_tensor("transformer_blocks.3.attn1.to_q.weight", (8, 16)))
    assert not torch.equal(first, random_tensor("transformer_blocks.4.attn1.to_q.weight", (8, 16)))


def test_the_stages_fit_together(model, tmp_path):
    figures = full_size.run_calibration(model, tmp_path / "stats")
    assert (figures["model_calls"], figures["inputs"]) == (full_size.STEPS, 1)
    for name in ("linear-w8", "smoothquant-w4p"):
        recipe = full_size.VARIANTS[name]
        made = full_size.run_conversion(model, recipe, tmp_path / "stats", tmp_path / name)
        assert sum(made["bytes_by_category"].values()) == made["transformer_bytes"]
        parts = made["cpu_seconds_by_part"]
        assert 0 < parts["scales and offsets"] < parts["all"]
        sampled = full_size.load_and_sample(tmp_path / name)
        assert (sampled["integer_linears"], sampled["weight_only_linears"]) == (12, 3)


def test_auto_is_timed_part_by_part(model, tmp_path):
    """What aimed rounding spends its time on is told, and no more than all of it; records and tables go by command."""
    full_size.run_calibration(model, tmp_path / "stats", 2)
    (tmp_path / "float").symlink_to(model)
    result = CliRunner().invoke(
        bench, ["full-size", "--only", "nothing,convert auto", "--out", str(tmp_path), "--blocks", "2", "--name", "few"]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    with (tmp_path / "few.csv").open() as file:
        told = next(csv.DictReader(file))
    assert (told["blocks"], told["memory_budget_mib"], told["earlier_parts"]) == ("2", "6144", "0")
    log = (tmp_path / "full_size.log").read_text()
    assert f"its progress: {tmp_path}/.auto-w4p.blocks/transformer/convert.log" in log
    assert "convert auto-w4p: " in log
    assert "1 of 1" in log
    with (tmp_path / "few_parts.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = {row["part"]: float(row["cpu_seconds"]) for row in rows}
    assert {row["stage"] for row in rows} == {"convert auto-w4p"}
    assert {"all", "codes"} <= parts.keys()
    assert sum(parts.values()) < 2.1 * parts["all"]  # rounded to tenths
    assert (tmp_path / "auto-w4p" / "transformer").exists()


def test_the_tables_hold_every_stage(tmp_path):
    base = {"cpu_seconds": 1.0, "peak_rss": 2**21, "load_before": 0.5, "load_after": 1.5}
    spent = {"all": 3.0, "codes": 2.0, "hash": 0.0}
    records = [
        {"stage": "calibrate", "seconds": 30.0, "bytes": 2**20, **base},
        {"stage": "convert y", "seconds": 0.0, "cpu_seconds_by_part": spent, **base},
        {"stage": "load and sample x", "seconds": 10.0, **base},
    ]
    full_size_report.write(tmp_path, records)
    with (tmp_path / "full_size.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["share"] for row in rows] == ["0.750", "0.000", "0.250"]
    assert [row["bytes_mib"] for row in rows] == ["1.0", "", ""]
    assert rows[0]["peak_rss_mib"] == "2"
    told = (tmp_path / "full_size_parts.csv").read_text().split()
    assert told == ["stage,part,cpu_seconds", "convert", "y,all,3.0", "convert", "y,codes,2.0"]
    assert json.loads((tmp_path / "full_size.json").read_text())["stages"] == records
