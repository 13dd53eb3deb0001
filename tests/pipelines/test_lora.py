"""A fine-tune as users have it: a LoRA file of diffusers, beside the integers or merged before the conversion."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline

import ditq_runtime
from ditq_converters import Recipe, convert

peft = pytest.importorskip("peft")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "ff.net.2"]


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def error(got, truth):
    return float((got - truth).norm() / truth.norm())


def test_a_lora_file_of_diffusers(build_pipe, packed_folder, transformer_inputs, tmp_path):
    name = "sd3"
    plain = build_pipe(name)
    tuned = copy.deepcopy(plain.transformer)
    inside = [n for n, _ in tuned.named_modules() if "blocks" in n and n.endswith(tuple(TARGETS))]
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=inside)
    tuned.add_adapter(config)
    generator = torch.Generator().manual_seed(2)
    for key, parameter in tuned.named_parameters():
        if "lora_" in key:
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    layers = peft.get_peft_model_state_dict(tuned)
    type(plain).save_lora_weights(tmp_path, transformer_lora_layers=layers)

    inputs = transformer_inputs(plain)[0][0]
    before = run(plain.transformer, inputs)
    merged = build_pipe(name)
    merged.load_lora_weights(tmp_path)
    expected = run(merged.transformer, inputs)
    assert error(before, expected) > 0.1

    pipe = DiffusionPipeline.from_pretrained(packed_folder(name, "htg", "token"))
    untouched = run(pipe.transformer, inputs)
    assert set(ditq_runtime.load_lora(pipe, tmp_path)) == set(inside)
    assert error(run(pipe.transformer, inputs), expected) < 0.03  # without the adapter it is 1.3 %
    ditq_runtime.unload_lora(pipe)
    assert torch.equal(run(pipe.transformer, inputs), untouched)

    merged.fuse_lora()
    merged.unload_lora_weights()
    packed = convert(merged, Recipe("linear"), out=tmp_path / "out", quiet=True)
    assert error(run(packed, inputs), expected) < 0.02
