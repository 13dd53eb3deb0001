"""The whole conversion: complete or not at all, the source untouched, and refusals before the work."""

import hashlib
import json
import os
import random
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from ditq_converters import (
    CalibrationStats,
    Recipe,
    StatisticsError,
    calibrate,
    convert,
    make_plan,
    read_plan,
)
from ditq_runtime import QuantLinear, execution_report

LINEAR = Recipe(method="linear")


def digest(model):
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(name.encode() + str(tensor.dtype).encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def pipe(make_pipeline):
    return make_pipeline()


@pytest.fixture(scope="module")
def stats(pipe, tmp_path_factory):
    return calibrate(pipe, tmp_path_factory.mktemp("stats"), steps=2, samples=3, quiet=True)


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe([1, 7], generator=generator, num_inference_steps=2, output_type="pt").images


@pytest.mark.parametrize("weights", ["w8", "w4p"])
@pytest.mark.parametrize("activations", ["token", "static"])
def test_the_float_model_is_not_changed(pipe, stats, weights, activations):
    model = pipe.transformer
    before, vae, types = digest(model), digest(pipe.vae), [type(m) for m in model.modules()]
    config = dict(model.config)
    packed = convert(pipe, Recipe(weights=weights, activations=activations), stats, quiet=True)
    assert digest(model) == before
    assert digest(pipe.vae) == vae
    assert [type(module) for module in model.modules()] == types
    assert dict(model.config) == config
    assert packed is not model
    assert pipe.transformer is model


def test_a_pipeline_becomes_a_pipeline(pipe, stats, tmp_path):
    out = tmp_path / "deep" / "out"
    packed = convert(pipe, Recipe(weights="w4p"), stats, out, quiet=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "ditq",
        "model_index.json",
        "scheduler",
        "transformer",
        "vae",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    loaded = DiffusionPipeline.from_pretrained(out)
    assert loaded.labels == pipe.labels == {"tench": 0, "Tinca tinca": 0, "goldfish": 1, "cock": 7}
    assert loaded.get_label_ids(["cock", "tench"]) == [7, 0]
    assert type(loaded.scheduler) is type(pipe.scheduler)
    assert digest(loaded.vae) == digest(pipe.vae)
    assert digest(loaded.transformer) == digest(packed)
    totals = execution_report(loaded.transformer).totals
    assert (totals["integer_linears"], totals["weight_only_linears"]) == (12, 3)
    images = draw(loaded)
    assert torch.isfinite(images).all()
    assert images.std() > 0


def test_a_transformer_becomes_a_transformer(pipe, stats, tmp_path):
    convert(pipe.transformer, Recipe(), stats, tmp_path / "out", quiet=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "ditq",
    ]
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == 15


def test_the_same_conversion_gives_the_same_bytes(pipe, stats, tmp_path):
    files = []
    for name in ("a", "b"):
        convert(pipe, Recipe(weights="w4p"), stats, tmp_path / name, quiet=True)
        files.append(
            {
                path.relative_to(tmp_path / name): path.read_bytes()
                for path in (tmp_path / name).rglob("*")
                if path.is_file()
            }
        )
    assert files[0] == files[1]


def test_shards(pipe, tmp_path):
    convert(pipe.transformer, LINEAR, out=tmp_path / "out", max_shard_size="200KB", quiet=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert digest(loaded) == digest(convert(pipe, LINEAR, quiet=True))


def test_provenance_is_kept(pipe, stats, tmp_path):
    convert(
        pipe, Recipe(weights="w4p", keep=("*.to_q",), alpha=0.75), stats, tmp_path / "o", quiet=True
    )
    config = json.loads((tmp_path / "o" / "transformer" / "config.json").read_text())
    made = config["quantization_config"]["recipe"]
    assert (made["method"], made["weights"], made["activations"]) == ("smoothquant", "w4p", "token")
    short = made["plan"]
    assert short["sites"]["transformer_blocks.*.fc2"]["options"] == {"alpha": 0.75}
    assert short["linears"]["transformer_blocks.*.attn1.to_q"] == {"weights": "fp32"}
    whole = read_plan(tmp_path / "o" / "ditq" / "plan.json")
    assert whole == make_plan(pipe, weights="w4p", keep=("*.to_q",), alpha=0.75)
    assert "2211.10438" in made["source"]
    assert made["calibration"] == {
        "calls": 2,
        "sampler": "DDIMScheduler",
        "inputs": 1,
        "model_hash": stats.manifest["models"]["transformer"]["model_hash"],
    }


def test_the_output_is_close_to_the_float_model(pipe, stats, inputs):
    batch = inputs(pipe.transformer)
    with torch.no_grad():
        truth = pipe.transformer(**batch).sample
        for weights, least in (("w8", 35), ("w4p", 15)):
            other = convert(pipe, Recipe(weights=weights), stats, quiet=True)(**batch).sample
            noise = (other - truth).norm()
            # steps of 1/127 of a range, uniform error: about 40 dB; 15 steps a group: about 20 dB
            assert 20 * torch.log10(truth.norm() / noise) > least


def test_an_output_in_use_is_refused_before_any_work(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.transformer.state_dict = lambda *_: pytest.fail("the work began")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "keep.txt").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError, match=f"{name} already exists; choose another"):
            convert(pipe, LINEAR, out=tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["keep.txt"]


def test_an_empty_output_folder_is_fine(pipe, tmp_path):
    (tmp_path / "out").mkdir()
    convert(pipe.transformer, LINEAR, out=tmp_path / "out", quiet=True)
    DiTTransformer2DModel.from_pretrained(tmp_path / "out")


def test_statistics_of_another_model_are_refused(make_pipeline, stats, tmp_path):
    with pytest.raises(StatisticsError, match="belong to another model"):
        convert(make_pipeline(seed=5), Recipe(), stats, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(method="linear", activations="static")])
def test_missing_statistics_are_asked_for(pipe, tmp_path, recipe):
    with pytest.raises(ValueError, match=r"needs statistics; run `ditq calibrate` first"):
        convert(pipe, recipe, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_damaged_statistics_leave_no_output(make_pipeline, tmp_path):
    pipe = make_pipeline()
    stats = calibrate(pipe, tmp_path / "stats", steps=2, samples=2, quiet=True)
    path = tmp_path / "stats" / "merged" / "transformer" / "call_0001.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    opened = CalibrationStats.open(tmp_path / "stats")
    assert opened.manifest == stats.manifest
    with pytest.raises(StatisticsError, match=r"call_0001\.safetensors"):
        convert(pipe, Recipe(), opened, tmp_path / "out", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats"]


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.1.attn1.to_k.weight",
        "transformer_blocks.0.norm1.linear.weight",
        "transformer_blocks.1.ff.net.2.bias",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight",
        "proj_out_2.weight",
        "pos_embed.proj.bias",
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_is_not_finite_is_refused(make_dit, tmp_path, name, value):
    """Such a checkpoint would be refused when it is loaded; by then the work is done and the cause far away."""
    model = make_dit()
    model.state_dict()[name].reshape(-1)[3] = value
    with pytest.raises(ValueError, match="finite") as refusal:
        convert(model, LINEAR, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    said = str(refusal.value)
    assert name.rpartition(".")[0] in said or "check the source checkpoint" in said


def test_an_unsupported_model_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="Conv2d has no family adapter"):
        convert(torch.nn.Conv2d(1, 1, 1), LINEAR, out=tmp_path / "out")


def test_a_failed_write_leaves_nothing(pipe, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert(pipe, LINEAR, out=tmp_path / "out", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_unfinished_work_for_another_output_is_left_alone(pipe, tmp_path):
    """`.out.v2.*.part` belongs to `out.v2`, which another process may be writing right now."""
    other = tmp_path / ".out.v2.a1b2c3d4.part"
    other.mkdir()
    (other / "half.safetensors").write_bytes(b"x")
    mine = tmp_path / ".out.a1b2c3d4.part"
    mine.mkdir()
    convert(pipe.transformer, LINEAR, out=tmp_path / "out", quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


JOB = "convert(pipe, Recipe(weights='w4p'), CalibrationStats.open({stats!r}), {out!r}, quiet=True)"


def test_a_killed_conversion_leaves_all_or_nothing(killable, pipe, stats, tmp_path):
    """Ten SIGKILLs among the writes of ten conversions: the output is absent or complete, and a rerun succeeds."""
    pipe.save_pretrained(tmp_path / "model")
    killable.prepare(f"pipe = diffusers.DiTPipeline.from_pretrained({str(tmp_path / 'model')!r})")
    folder = tmp_path / "outputs"
    folder.mkdir()
    whole = folder / "whole"
    events = killable.run(JOB.format(stats=str(stats.folder), out=str(whole)), slow=True)
    expected = digest(DiffusionPipeline.from_pretrained(whole).transformer)
    files = {path.relative_to(whole): path.stat().st_size for path in whole.rglob("*")}
    assert events > 10
    rng, cut_short = random.Random(0), 0
    moments = [1, events, *rng.choices(range(1, events + 1), k=8)]
    for attempt, event in enumerate(moments):
        out = folder / f"out{attempt}"
        job = JOB.format(stats=str(stats.folder), out=str(out))
        killable.kill_at(job, event, rng.uniform(0, 0.01))
        if out.exists():
            assert {p.relative_to(out): p.stat().st_size for p in out.rglob("*")} == files
            assert digest(DiffusionPipeline.from_pretrained(out).transformer) == expected
            continue
        cut_short += any(name.startswith(f".{out.name}.") for name in os.listdir(folder))
        killable.run(job)
        assert digest(DiffusionPipeline.from_pretrained(out).transformer) == expected
    assert cut_short >= 5  # the kills met half-written folders
    # a kill between the rename and the end leaves the lock's file, which nobody holds any more
    left = [name for name in os.listdir(folder) if not name.endswith(".lock")]
    assert sorted(left) == sorted(["whole", *(f"out{i}" for i in range(10))])


def recorded_otherwise(stats, folder, change):
    """A copy of statistics whose shards another ditq wrote: the same model, other tensors."""
    shutil.copytree(stats.folder, folder)
    for path in folder.rglob("call_*.safetensors"):
        save_file(change(load_file(path)), path)
    return CalibrationStats.open(folder)


@pytest.mark.parametrize("activations", ["static", "token"])
def test_statistics_of_an_older_layout_are_refused_by_a_sentence(
    pipe, stats, tmp_path, activations
):
    """A site that had another name then, and one that was recorded less wide."""
    site = "transformer_blocks.1.o_proj"
    recipe = Recipe("smoothquant", "w8", activations)
    renamed = recorded_otherwise(
        stats, tmp_path / "a", lambda t: {k.replace("1.o_proj", "1.out"): v for k, v in t.items()}
    )
    with pytest.raises(StatisticsError, match=rf"cannot read {site} .*; calibrate again"):
        convert(pipe, recipe, renamed, tmp_path / "out", quiet=True)
    narrow = recorded_otherwise(
        stats,
        tmp_path / "b",
        lambda t: {k: v[..., :32].contiguous() if site in k else v for k, v in t.items()},
    )
    with pytest.raises(StatisticsError, match=rf"{site} has 32 channels, .* read 64; another ditq"):
        convert(pipe, recipe, narrow, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
