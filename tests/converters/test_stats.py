"""Statistics on disk: read one site at a time, and refused by a sentence when they cannot be trusted."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ditq_converters import CalibrationStats, StatisticsError
from ditq_converters.calibrate import stats
from ditq_converters.calibrate.stats import (
    ResumePoint,
    model_hash,
    read_state,
    shard_path,
    write_shard,
    write_state,
)

SITES = ("a.qkv", "b.fc2")


@pytest.fixture
def folder(tmp_path):
    """Three calls of two sites, written by hand: values that name their site, call and side."""
    for call in range(3):
        tensors = {}
        for number, site in enumerate(SITES):
            base = torch.arange(4.0) + 100 * number + 10 * call
            tensors[f"{site}.min"], tensors[f"{site}.max"] = -base, base + 0.5
        save_file(tensors, tmp_path / f"call_{call:04d}.safetensors", {"call": str(call)})
    manifest = {"version": 1, "calls": 3, "timesteps": [900.0, 500.0, 0.0], "model_hash": "x"}
    manifest |= {"plan": {}, "sampler": "ddim"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


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


def test_a_shard_round_trip(tmp_path):
    ranges = {"s": (torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 1e-30]))}
    write_shard(tmp_path, 7, ranges)
    assert [path.name for path in tmp_path.iterdir()] == ["call_0007.safetensors"]
    with safe_open(shard_path(tmp_path, 7), "pt") as file:
        assert sorted(file.keys()) == ["s.max", "s.min"]
        assert torch.equal(file.get_tensor("s.min"), ranges["s"][0])
        assert torch.equal(file.get_tensor("s.max"), ranges["s"][1])


def test_the_resume_point_round_trip(tmp_path):
    assert read_state(tmp_path) is None
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    history = {"model_output.1": -latents}
    write_state(tmp_path, ResumePoint(3, latents, history))
    read = read_state(tmp_path)
    assert read.call == 3
    assert torch.equal(read.latents, latents)
    assert list(read.history) == ["model_output.1"]
    assert torch.equal(read.history["model_output.1"], -latents)


def test_a_missing_shard(folder):
    shard_path(folder, 1).unlink()
    with pytest.raises(StatisticsError, match=r"call 1 of 3 is missing; .*resumes"):
        CalibrationStats.open(folder)


@pytest.mark.parametrize("damage", ["cut off", "garbage", "empty"])
def test_a_damaged_shard_is_named(folder, damage):
    path = shard_path(folder, 2)
    data = path.read_bytes()
    path.write_bytes({"cut off": data[:-5], "garbage": b"\xff" * 64, "empty": b""}[damage])
    opened = CalibrationStats.open(folder)
    with pytest.raises(StatisticsError, match=r"call_0002\.safetensors: cannot read a\.qkv"):
        opened.ranges("a.qkv")


def test_a_shard_that_disappeared_is_named(folder):
    opened = CalibrationStats.open(folder)
    shard_path(folder, 0).unlink()
    with pytest.raises(StatisticsError, match=r"call_0000\.safetensors: cannot read"):
        opened.ranges("a.qkv")


def test_an_unknown_site_is_named(folder):
    with pytest.raises(StatisticsError, match=r"cannot read c\.qkv"):
        CalibrationStats.open(folder).ranges("c.qkv")


def test_values_that_are_not_finite_are_refused(folder):
    tensors = {f"{s}.{m}": torch.zeros(4) for s in SITES for m in ("min", "max")}
    tensors["a.qkv.max"][1] = torch.nan
    save_file(tensors, shard_path(folder, 1))
    with pytest.raises(StatisticsError, match=r"a\.qkv holds values that are not finite"):
        CalibrationStats.open(folder).ranges("a.qkv")


def test_a_missing_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(StatisticsError, match=r"no manifest\.json there; .*ditq calibrate MODEL"):
        CalibrationStats.open(tmp_path)
    with pytest.raises(StatisticsError, match=r"no manifest\.json"):
        CalibrationStats.open(tmp_path / "nowhere")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(folder, version):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    with pytest.raises(StatisticsError, match=r"version .*this ditq reads 1; calibrate again"):
        CalibrationStats.open(folder)


@pytest.mark.parametrize("text", ['{"version": 1, ', "", "[1]", '{"version": 1}'])
def test_a_damaged_manifest_is_refused_by_a_sentence(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(StatisticsError, match=r"manifest\.json"):
        CalibrationStats.open(folder)


def test_a_damaged_resume_point_is_refused_by_a_sentence(tmp_path):
    write_state(tmp_path, ResumePoint(3, torch.zeros(1), {}))
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(StatisticsError, match=r"state\.safetensors"):
        read_state(tmp_path)


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
    CalibrationStats(folder, {**manifest, "model_hash": model_hash(model)}).check_model(model)
    with pytest.raises(StatisticsError, match="another model"):
        CalibrationStats.open(folder).check_model(model)
