"""What Python calls are given is looked at before any work: one sentence of ours, and no folder."""

import pytest
import torch

from ditq_converters import Recipe, calibrate, convert, open_model
from ditq_runtime import CheckpointError, DitqConfig, set_lora

LINEAR = Recipe("linear")
NAN = float("nan")


@pytest.fixture(scope="module")
def pipe():
    return open_model("demo:digits")


@pytest.mark.parametrize(
    ("plan", "options", "sentence"),
    [
        (None, {}, "plan must be a Plan, a Recipe, or component -> its plan, got NoneType None"),
        (
            {"weights": "w8"},
            {},
            "plan must be a Plan, a Recipe, or component -> its plan, got dict",
        ),
        (LINEAR, {"stats": "stats"}, "stats must be what calibrate returned, got str 'stats'"),
        (LINEAR, {"out": 123}, "out must be the path of a folder, got int 123"),
        (LINEAR, {"max_shard_size": "-1GB"}, "max_shard_size must be a size such as 10GB"),
        (LINEAR, {"max_shard_size": 0}, "max_shard_size must be a size such as 10GB"),
        (LINEAR, {"max_shard_size": "banana"}, "max_shard_size must be a size such as 10GB"),
    ],
)
def test_convert(pipe, tmp_path, plan, options, sentence):
    with pytest.raises(ValueError, match=f"^convert: {sentence}"):
        convert(pipe, plan, **{"out": tmp_path / "out", "quiet": True, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["20KB", "1 gb", 30_000])
def test_sizes_of_shards(pipe, tmp_path, size):
    convert(pipe.transformer, LINEAR, out=tmp_path / "out", max_shard_size=size, quiet=True)
    shards = len(list((tmp_path / "out").glob("*.safetensors")))
    assert (shards > 1) == (size != "1 gb")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": "3"}, "steps must be a whole number, got '3'"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"guidance": NAN}, "input 0: guidance_scale must be a finite number, got nan"),
        ({"inputs": [{}]}, "input 0: DiTPipeline needs class_labels, which is missing"),
        ({"inputs": [5]}, "inputs must be a list with the arguments of each call by name, got 5"),
        ({"inputs": {"class_labels": [1]}}, "inputs must be a list with the arguments of each"),
        ({"run": 5}, "run must be a function that calls the model, got 5"),
    ],
)
def test_calibrate(pipe, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=f"^calibrate: {sentence}"):
        calibrate(pipe, tmp_path / "stats", quiet=True, **options)
    assert list(tmp_path.iterdir()) == []


def test_codes_take_no_floats(pipe, tmp_path):
    packed = convert(pipe.transformer, Recipe("linear", "w8"), quiet=True)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    floats = pipe.transformer.state_dict()
    with pytest.raises(CheckpointError, match=r"weight: dtype torch.float32 in the state dict"):
        packed.load_state_dict(floats, strict=False)
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(packed.state_dict()[name], before[name])
    packed.load_state_dict(before)


def test_a_factor_or_a_pattern_that_is_none(pipe):
    with pytest.raises(ValueError, match="DitqConfig: keep must be a tuple of patterns, got 5"):
        DitqConfig(weights="w8", keep=5)
    packed = convert(pipe.transformer, LINEAR, quiet=True)
    with pytest.raises(ValueError, match="set_lora: expected a finite factor of one of no adapt"):
        set_lora(packed, {"default": "1"})


def test_names_to_keep_are_texts():
    with pytest.raises(ValueError, match=r"keep must be a tuple of patterns, got \(None,\)"):
        Recipe("linear", keep=(None,))
