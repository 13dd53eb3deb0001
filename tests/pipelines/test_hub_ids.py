"""`user/name` instead of a folder: repositories in a local hub cache, with the network switched off."""

import json
import shutil

import diffusers
import huggingface_hub.constants
import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel

from ditq_converters import Recipe, convert, open_model
from ditq_converters.evaluate.inputs import open_packed

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Publishes a folder in a cache of the hub's layout; returns its id. Every request would fail."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for module in (diffusers.pipelines.pipeline_utils, diffusers.configuration_utils):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)

    def publish(folder, name):
        repository = tmp_path / f"models--someone--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        return f"someone/{name}"

    return publish


def same(model, other):
    tensors = other.state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_a_packed_pipeline(hub, packed_folder, ditq, tmp_path):
    name = hub(packed_folder("sd3"), "packed")
    pipe = DiffusionPipeline.from_pretrained(name)
    expected = DiffusionPipeline.from_pretrained(packed_folder("sd3")).transformer
    assert type(pipe).__name__ == "StableDiffusion3Pipeline"
    assert same(pipe.transformer, expected)
    assert same(open_packed(name).transformer, expected)
    size = ("--steps", 1, "--height", 16, "--width", 16, "--prompt", "a fox")
    assert ditq("sample", name, *size, "--out", tmp_path / "x.png") == 0
    with pytest.raises(ValueError, match="someone/packed: is quantized already; give the float"):
        open_model(name)


@pytest.mark.filterwarnings(
    "ignore:The `local_dir_use_symlinks`:UserWarning"
)  # diffusers' own call
def test_a_packed_transformer_alone(hub, packed_folder):
    folder = packed_folder("sd3") / "transformer"
    name = hub(folder, "alone")
    expected = SD3Transformer2DModel.from_pretrained(folder)
    assert same(SD3Transformer2DModel.from_pretrained(name), expected)
    assert same(open_packed(name), expected)
    with pytest.raises(ValueError, match="is quantized already"):
        open_model(name)


@pytest.mark.parametrize("part", ["", "transformer"])
def test_a_float_repository_converts(hub, float_folder, packed_folder, tmp_path, part):
    name = hub(float_folder("sd3") / part, "float")
    opened = open_model(name)
    assert isinstance(opened, SD3Transformer2DModel) == bool(part)
    convert(name, Recipe("linear"), out=tmp_path / "out", quiet=True)
    file = "transformer/diffusion_pytorch_model.safetensors"
    packed = tmp_path / "out" / file.removeprefix(f"{part}/" if part else "")
    assert packed.read_bytes() == (packed_folder("sd3") / file).read_bytes()


def test_inspect_takes_ids_and_weights_that_are_no_safetensors(
    hub, ditq, packed_folder, build_pipe, capsys, tmp_path
):
    capsys.readouterr()
    assert ditq("inspect", hub(packed_folder("sd3"), "packed"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["method"] == "linear"
    build_pipe("sd3").transformer.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert ditq("inspect", tmp_path / "old", "--json") == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "SD3Transformer2DModel"


def test_an_id_that_is_nowhere_is_refused_by_a_sentence(hub, ditq, capsys, tmp_path):
    with pytest.raises(OSError, match="no such folder here, not in the hub's cache"):
        open_model("someone/nothing")
    capsys.readouterr()
    assert ditq("sample", "someone/nothing", "--out", tmp_path / "x.png") == 1
    assert "someone/nothing: no such folder here, not in the hub's cache" in capsys.readouterr().err
