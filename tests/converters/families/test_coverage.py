"""`ditq inspect`: coverage against hand-worked numbers and against the bytes that a conversion stores."""

import json

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, FluxTransformer2DModel

from ditq_converters import convert
from ditq_converters.cli.inspect import inspect_float
from ditq_converters.models.open import open_skeleton
from ditq_converters.plan.coverage import coverage
from ditq_converters.plan.make import make_plan
from ditq_runtime.families import family_of
from ditq_runtime.format.folder import open_folder

NAMES = ["dit", "pixart-alpha", "pixart-sigma", "sd3", "sd3.5", "flux-schnell", "flux-dev"]
KINDS = {
    "dit": {"K1", "V", "G", "-"},
    "pixart-alpha": {"K2", "V", "G", "X", "-"},
    "pixart-sigma": {"K2", "V", "G", "X", "-"},
    "sd3": {"K1", "V", "G", "-"},
    "sd3.5": {"K1", "V", "G", "-"},
    "flux-schnell": {"K1", "V", "V|G", "G", "-"},
    "flux-dev": {"K1", "V", "V|G", "G", "-"},
}


def covered_by(model, **choices):
    return coverage(model, family_of(type(model).__name__), make_plan(model, **choices))


def inspected(folder, **choices):
    model = open_skeleton(str(folder))
    return inspect_float(model, make_plan(model, **choices))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", ["w8", "w4p"])
def test_predicted_bytes_are_the_stored_ones(make_case, tmp_path, name, weights):
    model, _ = make_case(name, torch.bfloat16)
    choices = {"method": "linear", "weights": weights, "group_size": 32}
    convert(model, make_plan(model, **choices), out=tmp_path / "out", quiet=True)
    stored = sum(info.nbytes for info in open_folder(tmp_path / "out").headers.values())
    covered = covered_by(model, **choices)
    assert covered.packed_bytes == stored
    assert covered.float_bytes == sum(t.numel() * 2 for t in model.state_dict().values())


def test_flops_of_a_dit_by_hand(make_case):
    """16 tokens of width 64: q, k, v, o 4 * 64^2, MLP 8 * 64^2; one row: embedders, modulation, final modulation."""
    model, _ = make_case("dit")
    d, tokens, blocks = 64, 16, 2
    integer = blocks * 2 * tokens * 12 * d * d
    embedder = 2 * (256 * d + d * d)  # of every block, and once more for the final layer
    rest = blocks * (embedder + 2 * 6 * d * d) + embedder + 2 * d * 2 * d + 2 * tokens * d * 32
    covered = covered_by(model, method="linear")
    assert sum(covered.flops.values()) == integer + rest
    assert covered.integer_flops_share == integer / (integer + rest)
    assert covered.tokens == tokens


def test_flops_of_flux_count_both_streams(make_case):
    """1024 image tokens, 512 of text: one stream each in a double block, both in a single one."""
    model, _ = make_case("flux-dev")
    flops = covered_by(model, method="linear").flops
    assert flops["transformer_blocks.0.attn.to_q"] == 2 * 1024 * 64 * 64
    assert flops["transformer_blocks.0.attn.add_q_proj"] == 2 * 512 * 64 * 64
    assert flops["single_transformer_blocks.1.proj_out"] == 2 * 1536 * (64 + 256) * 64
    assert flops["transformer_blocks.0.norm1.linear"] == 2 * 64 * 6 * 64


@pytest.mark.parametrize("name", NAMES)
def test_inspect_needs_no_weights_and_names_every_linear(make_case, tmp_path, name):
    model, _ = make_case(name)
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(
            file.read_bytes()[:-1]
        )  # damaged on purpose: only headers are there to be read
    report = inspected(tmp_path)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {layer["name"] for layer in report["layers"]} == linears
    assert {layer["kind"] for layer in report["layers"]} == KINDS[name]
    assert all(layer["fold"] for layer in report["layers"])
    assert report["integer_flops_share"] > 0.75  # embedders weigh more in a tiny model
    json.dumps(report)


def test_a_discovered_family_has_no_flops_but_a_plan(tmp_path):
    AuraFlowTransformer2DModel(
        sample_size=16, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=64, pos_embed_max_size=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    report = inspected(tmp_path, method="linear")
    assert report["integer_flops_share"] is None
    assert {layer["kind"] for layer in report["layers"]} == {"-", "V", "M", "X"}
    assert report["packed_bytes"] < report["float_bytes"]


def test_full_size_flux_is_inspected_without_its_weights(tmp_path):
    """11.9 billion parameters; 27 % of them modulation, so nearly all become integers."""
    config = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = inspected(tmp_path)
    assert 11.8e9 < report["parameters"] < 12e9
    assert report["architecture"] == FluxTransformer2DModel.__name__
    assert report["quantized_parameters_share"] > 0.99
    modulation = sum(e["parameters"] for e in report["layers"] if e["site"] == "modulation")
    assert 0.26 < modulation / report["parameters"] < 0.28


@pytest.mark.parametrize(
    ("name", "norm"), [("dit", "ada_norm_zero"), ("pixart-sigma", "ada_norm_single")]
)
def test_an_old_folder_that_says_transformer_2d_is_inspected_as_what_it_is(
    make_case, tmp_path, name, norm
):
    model, _ = make_case(name)
    model.save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "norm_type": norm}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert inspected(tmp_path)["architecture"] == type(model).__name__
