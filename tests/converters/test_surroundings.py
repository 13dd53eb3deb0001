"""What a caller has set around us changes no bit, and stands as it was when we are done."""

import hashlib

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from ditq_bench.stress.surroundings import SURROUNDINGS as EVERYWHERE
from ditq_converters import Recipe, calibrate, convert, make_plan
from ditq_converters.demo.identity_vae import build_identity_vae
from ditq_runtime import DitqConfig
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.layers.linear import QuantLinear

RECIPE = Recipe("ditas", "w4p", "static", group_size=32, rounding="gptq", lora_rank=4)


# threads change the order of sums in float layers, which these whole models have
SURROUNDINGS = {name: make for name, make in EVERYWHERE.items() if name != "threads"}


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    ).eval().requires_grad_(False)  # fmt: skip
    torch.nn.init.normal_(model.transformer_blocks[0].norm1.linear.weight, std=0.05)
    return DiTPipeline(model, build_identity_vae(), DDIMScheduler(clip_sample=False))


def digest(folder):
    """Of every file below a folder but those that hold times."""
    files = sorted(f for f in folder.rglob("*.safetensors"))
    assert files
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def work(pipe, folder):
    """Calibrate, plan, convert, quantize while loading: digests of everything that was written."""
    stats = calibrate(pipe, folder / "stats", steps=2, samples=2, quiet=True)
    plan = make_plan(pipe, stats, method="linear")
    convert(pipe, RECIPE, stats, folder / "out", quiet=True)
    if torch.get_default_device().type != "meta":  # diffusers loads no model under it
        loaded = DiTTransformer2DModel.from_pretrained(
            folder.parent / "float", quantization_config=DitqConfig(weights="w4p", group_size=32)
        )
        loaded.save_pretrained(folder / "loaded")
    return digest(folder), repr(plan)


@pytest.fixture(scope="module")
def expected(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    pipe.transformer.save_pretrained(folder / "float")
    (folder / "alone").mkdir()
    return folder, work(pipe, folder / "alone")


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_is_written_does_not_depend_on_what_is_set(pipe, expected, name):
    folder, (files, plan) = expected
    (folder / name).mkdir()
    with SURROUNDINGS[name]():
        before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_default_device()
        written, planned = work(pipe, folder / name)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (torch.get_default_dtype(), torch.get_default_device()) == before[1:]
        assert torch.is_autocast_enabled("cpu") == name.startswith("autocast")
        assert torch.are_deterministic_algorithms_enabled() == (name == "deterministic")
        medium = name == "matmul precision"
        assert torch.get_float32_matmul_precision() == ("medium" if medium else "highest")
        assert torch.is_inference_mode_enabled() == (name == "inference mode")
    assert planned == plan
    assert written.items() <= files.items()
    assert len(written) == len(files) - (name == "default device")


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_linear_that_is_kept_in_fp32_computes_in_fp32(name):
    linear = QuantLinear(64, 32, LayerFormat("fp32", "none"), torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator)
    linear.weight.data = torch.randn(32, 64, generator=generator)
    linear.bias.data = torch.randn(32, generator=generator)
    expected = linear(x)
    with SURROUNDINGS[name]():
        assert torch.equal(linear(x), expected)
