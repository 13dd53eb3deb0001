"""Statistics on disk: read one site at a time, and refused by a sentence when they cannot be trusted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ditq_converters import CalibrationStats, StatisticsError, calibrate
from ditq_converters.calibrate import stats
from ditq_converters.calibrate.stats import model_hash, shard_path

VERSION_1 = Path(__file__).resolve().parents[1] / "fixtures/version1/statistics/dit_htg"
SMALL = {"labels": (0, 1), "batch": 1, "steps": 2, "guidance": 1.0, "quiet": True}
SITES = ("a.qkv", "b.fc2")


@pytest.fixture
def folder(tmp_path):
    """Three timesteps of two sites, merged by hand: values that name their site, call and side; no input is there."""
    merged = tmp_path / "merged" / "transformer"
    merged.mkdir(parents=True)
    for call in range(3):
        tensors = {}
        for number, site in enumerate(SITES):
            base = torch.arange(4.0) + 100 * number + 10 * call
            tensors[f"{site}.min"], tensors[f"{site}.max"] = -base, base + 0.5
        save_file(tensors, shard_path(merged, call), {"call": str(call)})
    (merged / "schedule.json").write_text('{"timesteps": [900.0, 500.0, 0.0], "row_calls": []}')
    (tmp_path / "merged" / "inputs.json").write_text("[]")
    manifest = {"version": 2, "models": {"transformer": {"model_hash": "x"}}, "inputs": []}
    manifest |= {"settings": {"attention": True}, "sampler": "none"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def call_path(folder, call):
    return shard_path(folder / "merged" / "transformer", call)


def test_ranges_are_stacked_in_call_order(folder):
    opened = CalibrationStats.open(folder)
    low, high = opened.ranges("b.fc2")
    expected = torch.arange(4.0) + 100 + torch.tensor([[0.0], [10.0], [20.0]])
    assert torch.equal(low, -expected)
    assert torch.equal(high, expected + 0.5)
    assert (opened.calls, opened.timesteps) == (3, [900.0, 500.0, 0.0])


def test_only_the_asked_site_is_read(folder, monkeypatch):
    read = []

    class Spy:
        def __init__(self, path, framework):
            self._file = safe_open(path, framework)

        def __enter__(self):
            self._open = self._file.__enter__()
            return self

        def __exit__(self, *error):
            return self._file.__exit__(*error)

        def get_tensor(self, name):
            read.append(name)
            return self._open.get_tensor(name)

    monkeypatch.setattr(stats, "safe_open", Spy)
    CalibrationStats.open(folder).ranges("a.qkv")
    assert sorted(read) == ["a.qkv.max"] * 3 + ["a.qkv.min"] * 3


def test_a_missing_input_is_named(make_pipeline, tmp_path):
    stats = calibrate(make_pipeline(), tmp_path, **SMALL)
    shutil.rmtree(tmp_path / "inputs" / "0001")
    with pytest.raises(StatisticsError, match=r"input 1 of 2 is missing; .*it resumes"):
        CalibrationStats.open(stats.folder)


@pytest.mark.parametrize("name", ["0000.safetensors", "shard.json"])
def test_a_damaged_input_is_named_and_can_be_made_again(make_pipeline, tmp_path, name):
    calibrate(make_pipeline(), tmp_path, **SMALL)
    path = tmp_path / "inputs" / "0001" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StatisticsError, match=r"inputs/0001: cannot be read .*; delete it and run"):
        CalibrationStats.open(tmp_path)
    shutil.rmtree(path.parent)
    assert calibrate(make_pipeline(), tmp_path, **SMALL).calls == 2


def test_transformers_are_asked_for_by_name(folder):
    opened = CalibrationStats.open(folder)
    assert (opened.components, opened.has_attention) == (["transformer"], True)
    assert opened.of("transformer") == opened
    with pytest.raises(StatisticsError, match="statistics of transformer, not of transformer_2"):
        opened.of("transformer_2")


def test_version_1_says_what_it_has_not():
    opened = CalibrationStats.open(VERSION_1)
    assert opened.provenance["model_hash"] == opened.manifest["model_hash"]
    with pytest.raises(StatisticsError, match="version 1 kept no inputs of modulation"):
        opened.modulation("transformer_blocks.0.norm1.linear")
    with pytest.raises(StatisticsError, match="version 1 kept no calls to replay"):
        next(opened.replay())


def test_version_1_is_not_gone_on_with(make_pipeline, tmp_path):
    shutil.copytree(VERSION_1, tmp_path / "old")
    with pytest.raises(StatisticsError, match="of version 1, which can be read but not gone on"):
        calibrate(make_pipeline(), tmp_path / "old", **SMALL)


@pytest.mark.parametrize("damage", ["cut off", "garbage", "empty"])
def test_a_damaged_shard_is_named(folder, damage):
    path = call_path(folder, 2)
    data = path.read_bytes()
    path.write_bytes({"cut off": data[:-5], "garbage": b"\xff" * 64, "empty": b""}[damage])
    opened = CalibrationStats.open(folder)
    with pytest.raises(StatisticsError, match=r"call_0002\.safetensors: cannot read a\.qkv"):
        opened.ranges("a.qkv")


def test_a_shard_that_disappeared_is_named(folder):
    opened = CalibrationStats.open(folder)
    call_path(folder, 0).unlink()
    with pytest.raises(StatisticsError, match=r"call_0000\.safetensors: cannot read"):
        opened.ranges("a.qkv")


def test_an_unknown_site_is_named(folder):
    with pytest.raises(StatisticsError, match=r"cannot read c\.qkv"):
        CalibrationStats.open(folder).ranges("c.qkv")


def test_values_that_are_not_finite_are_refused(folder):
    tensors = {f"{s}.{m}": torch.zeros(4) for s in SITES for m in ("min", "max")}
    tensors["a.qkv.max"][1] = torch.nan
    save_file(tensors, call_path(folder, 1))
    with pytest.raises(StatisticsError, match=r"a\.qkv holds values that are not finite"):
        CalibrationStats.open(folder).ranges("a.qkv")


def test_a_missing_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(StatisticsError, match=r"no manifest\.json there; .*ditq calibrate MODEL"):
        CalibrationStats.open(tmp_path)
    with pytest.raises(StatisticsError, match=r"no manifest\.json"):
        CalibrationStats.open(tmp_path / "nowhere")


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_version_is_refused(folder, version):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    with pytest.raises(
        StatisticsError, match=r"version .*this ditq reads 1 and 2; calibrate again"
    ):
        CalibrationStats.open(folder)


@pytest.mark.parametrize("text", ['{"version": 2, ', "", "[1]", '{"version": 2}'])
def test_a_damaged_manifest_is_refused_by_a_sentence(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(StatisticsError, match=r"manifest\.json"):
        CalibrationStats.open(folder)


def test_the_model_hash_sees_every_tensor(make_dit):
    model = make_dit()
    first = model_hash(model)
    assert model_hash(make_dit()) == first
    for name, tensor in model.state_dict().items():
        kept = tensor.reshape(-1)[0].clone()
        tensor.reshape(-1)[0] = kept + 1
        assert model_hash(model) != first, name
        tensor.reshape(-1)[0] = kept
    assert model_hash(model) == first
    assert model_hash(make_dit().bfloat16()) != first


def test_check_model(folder, make_dit):
    model = make_dit()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["models"]["transformer"]["model_hash"] = model_hash(model)
    CalibrationStats(folder, manifest).check_model(model)
    with pytest.raises(StatisticsError, match="another model"):
        CalibrationStats.open(folder).check_model(model)
