"""Quantized attention on disk: shards, every defect of its scales, its part of the scheme; and compiled."""

import json
import shutil
import warnings

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ditq_runtime import CheckpointError, Scheme
from ditq_runtime.format.attention import AttentionFormat
from ditq_runtime.format.folder import open_folder
from ditq_runtime.host.sizes import size_by_category

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
CORE = "transformer_blocks.1.attn1.core"
HEADS, BLOCKS = 2, 2


@pytest.fixture
def copy(packed_folder, tmp_path):
    """Recipe name -> a copy of its transformer folder, to be damaged."""

    def make(name):
        folder = shutil.copytree(packed_folder(name) / "transformer", tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]["digests"]  # they would see the damage first
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def scheme_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["scheme"]


def change_scheme(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["scheme"])
    path.write_text(json.dumps(config))


def floats(*values):
    return torch.tensor(values, dtype=torch.float32).numpy().tobytes()


def test_what_is_stored(packed_folder, take_apart):
    entries = take_apart(packed_folder("attention_static") / "transformer" / WEIGHTS_FILE).entries
    stored = {name: entry[:2] for name, entry in entries.items() if ".core." in name}
    assert stored == {
        f"transformer_blocks.{block}.attn1.core.{field}": ["F32", [HEADS]]
        for block in range(BLOCKS)
        for field in ("q_scale", "k_scale", "v_scale")
    }
    entries = take_apart(packed_folder("attention_token") / "transformer" / WEIGHTS_FILE).entries
    assert not [name for name in entries if ".core." in name]


def test_the_scheme_lists_it(packed_folder):
    static = scheme_of(packed_folder("attention_static") / "transformer")["attention"]
    names = {f"transformer_blocks.{block}.attn1" for block in range(BLOCKS)}
    assert static == {name: {"values": "int8", "scales": "static"} for name in names}
    token = scheme_of(packed_folder("attention_token") / "transformer")["attention"]
    assert token == {name: {"values": "bf16", "scales": "token"} for name in names}
    assert Scheme.from_dict(scheme_of(packed_folder("attention_static") / "transformer")).attention[
        "transformer_blocks.0.attn1"
    ] == AttentionFormat("int8", "static")


def test_a_checkpoint_from_before_there_was_any_loads(copy, forward, load):
    """Without quantized attention nothing is written, so the file is what an older converter wrote."""
    folder = copy("w8_static")
    assert "attention" not in scheme_of(folder)
    loaded = DiTTransformer2DModel.from_pretrained(folder)
    assert loaded.config.quantization_config.scheme.attention == {}
    assert "attention" not in loaded.config.quantization_config.to_dict()["scheme"]


def test_shards(packed_folder, load, forward, tmp_path):
    expected = forward(load(packed_folder("attention_static")))
    load(packed_folder("attention_static")).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(forward(loaded), expected)


DAMAGES = {
    "missing": (None, "missing from the checkpoint"),
    "longer": (["F32", [3], floats(1, 1, 1)], r"shape \[3\] in the checkpoint, \[2\] expected"),
    "half": (["F16", [2], b"\0" * 4], "dtype torch.float16 in the checkpoint, torch.float32"),
    "zero": (["F32", [2], floats(1, 0)], "every scale must be positive"),
    "negative": (["F32", [2], floats(-1, 1)], "every scale must be positive"),
    "nan": (["F32", [2], floats(1, float("nan"))], "not finite"),
}


@pytest.mark.parametrize("field", ["q_scale", "k_scale", "v_scale"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_scales_are_refused_by_name(copy, take_apart, field, kind):
    weights = take_apart(copy("attention_static") / WEIGHTS_FILE)
    entry, sentence = DAMAGES[kind]
    weights.write({f"{CORE}.{field}": entry})
    with pytest.raises(CheckpointError, match=rf"{CORE}\.{field}: .*{sentence}"):
        DiTTransformer2DModel.from_pretrained(weights.path.parent)


def test_scales_that_the_scheme_does_not_promise_are_refused(copy, take_apart):
    folder = copy("attention_static")
    change_scheme(folder, lambda scheme: scheme["attention"].pop("transformer_blocks.1.attn1"))
    with pytest.raises(CheckpointError, match=rf"{CORE}\..*unknown tensor in the checkpoint"):
        DiTTransformer2DModel.from_pretrained(folder)


def set_format(**changes):
    return lambda scheme: scheme["attention"]["transformer_blocks.1.attn1"].update(changes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (set_format(values="fp8"), r"values must be one of .* got 'fp8'"),
        (set_format(scales=None), "scales must be of type str, got None"),
        (set_format(bits=8), r"attn1: missing keys \[\], unknown keys \['bits'\]"),
        (
            lambda s: s["attention"]["transformer_blocks.1.attn1"].clear(),
            r"missing keys \['scales'",
        ),
        (lambda s: s["attention"].update(attn3=[1]), "attn3: expected an object, got list"),
        (lambda s: s.update(attention=["attn1"]), "attention must be of type dict"),
        (
            lambda s: s["attention"].update(attn3={"values": "int8", "scales": "token"}),
            "attn3: listed in the scheme, but the model has no attention",
        ),
        (
            lambda s: s["attention"].update(proj_out_2={"values": "int8", "scales": "token"}),
            "proj_out_2: a Linear is not diffusers' Attention",
        ),
    ],
)
def test_attention_that_cannot_be_is_refused(copy, change, sentence):
    folder = copy("attention_static")
    change_scheme(folder, change)
    with pytest.raises(CheckpointError, match=sentence):
        DiTTransformer2DModel.from_pretrained(folder)


def test_its_scales_count_as_scales(packed_folder):
    sizes = size_by_category(open_folder(packed_folder("attention_static")))
    without = size_by_category(open_folder(packed_folder("w8_static")))  # the same but for them
    category = "channel and activation scales"
    assert sizes[category] - without[category] == BLOCKS * 3 * HEADS * 4
    assert sizes["other float"] == without["other float"]


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("attention_static", "attention_qk_int8_pv_int8"),
        ("attention_token", "attention_qk_int8_pv_bf16"),
    ],
)
def test_compiled_whole_it_is_one_graph_and_equals_eager(packed_folder, load, name, op):
    model, graphs = load(packed_folder(name)), []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        for step in (900, 1):
            batch = {"timestep": torch.tensor([step, 5]), "class_labels": torch.tensor([3, 7])}
            assert torch.equal(compiled(latents, **batch).sample, model(latents, **batch).sample)
    assert len(graphs) == 1
    assert len([target for target in graphs[0] if op in target]) == BLOCKS
    torch.compiler.reset()
