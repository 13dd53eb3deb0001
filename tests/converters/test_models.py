"""Opening MODEL: what it may be, and one sentence for what it may not be."""

import json

import pytest
import torch
from diffusers import DiTPipeline

from ditq_converters import Recipe, convert, open_model
from ditq_converters.demo import open_demo
from ditq_runtime.calls.parts import transformer_of


@pytest.fixture
def pipeline_folder(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def same_weights(model, other):
    tensors = other.state_dict()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_a_pipeline_folder(pipeline_folder, make_dit):
    """pytest turns warnings into errors here: opening a folder warns of nothing."""
    pipe = open_model(str(pipeline_folder))
    assert isinstance(pipe, DiTPipeline)
    assert same_weights(pipe.transformer, make_dit())
    assert transformer_of(pipe) is pipe.transformer


def test_a_transformer_folder(pipeline_folder, make_dit):
    model = open_model(str(pipeline_folder / "transformer"))
    assert same_weights(model, make_dit())
    assert transformer_of(model) is model


@pytest.mark.parametrize("name", ["demo:digits", "demo:digits-salient"])
def test_a_demo(name):
    assert same_weights(open_model(name).transformer, open_demo(name).transformer)
    assert open_model(name, torch.bfloat16).transformer.dtype == torch.bfloat16


def test_a_dtype(pipeline_folder):
    assert open_model(str(pipeline_folder), torch.bfloat16).transformer.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("demo:letters", "demo:digits, demo:digits-salient"),
        ("./nowhere", "not a diffusers folder, not a hub id"),
        ("/nowhere/at/all", "not a diffusers folder"),
        ("a/b/c", "not a hub id"),
        ("DiT-XL-2-256x256.pt", "there is no such file"),
    ],
)
def test_refusals(model, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_model(model)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no model_index\.json and no config\.json"):
        open_model(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="not a diffusers folder"):
        open_model(str(tmp_path / "notes.txt"))


def test_a_packed_model_is_refused(make_pipeline, tmp_path):
    convert(make_pipeline(), Recipe(method="linear"), out=tmp_path / "packed", quiet=True)
    for folder in (tmp_path / "packed", tmp_path / "packed" / "transformer"):
        with pytest.raises(ValueError, match="quantized already; give the float model"):
            open_model(str(folder))
    config = json.loads((tmp_path / "packed" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "ditq"
