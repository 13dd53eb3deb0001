"""Tiny random DiTs, converted once for the whole folder."""

import json
import struct
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
)
from safetensors.torch import save_file

from ditq_converters import Recipe, calibrate, convert
from ditq_converters.demo.identity_vae import build_identity_vae

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
NAMES = {"3": "three", "7": "seven"}

# name -> (which float model, recipe); "shared" has one embedder for all blocks, "own" one in each
RECIPES = {
    "w8_static": ("own", Recipe("smoothquant", "w8", "static")),
    "w8_token": ("shared", Recipe("linear", "w8", "token")),
    "w4p_static": ("shared", Recipe("smoothquant", "w4p", "static", group_size=32)),
    "w4p_token": ("own", Recipe("smoothquant", "w4p", "token", group_size=32, modulation="w8")),
    "w4g_static": ("shared", Recipe("smoothquant", "w4g", "static", group_size=32)),
    "attention_static": ("own", Recipe("smoothquant", "w8", "static", attention="int8")),
    "attention_token": ("shared", Recipe("linear", "w8", "token", attention="bf16")),
    "kept": ("shared", Recipe("smoothquant", "w8", "token", keep=("*.attn1.to_q",))),
}


def _build_model(shared=False, seed=0, **changes):
    torch.manual_seed(seed)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }
    model = DiTTransformer2DModel(**{**config, **changes}).eval().requires_grad_(False)
    first, *others = model.transformer_blocks
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.05)
        torch.nn.init.normal_(block.norm1.linear.bias, std=0.3)
    for block in others if shared else ():
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model


@pytest.fixture(scope="session")
def build_model():
    """Builds a random DiT, 64 wide, with 16 tokens."""
    return _build_model


@pytest.fixture(scope="session")
def pipes():
    """Float pipelines: kind -> DiTPipeline."""
    return {
        kind: DiTPipeline(
            _build_model(shared=kind == "shared"),
            build_identity_vae(),
            DDIMScheduler(clip_sample=False),
            id2label=NAMES,
        )
        for kind in ("own", "shared")
    }


def _randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got, expected):
    """Relative error of an output, in the norm."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


BEHIND_NORMS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "net.0.proj", "net.2")


def cost_of_noise(make, run, hook):
    """Relative error of a model's output when a hook disturbs it: what errors of that size do to this very model.

    Args:
        make: gives a fresh model.
        run: its output.
        hook: model, noise -> registers hooks that add it; `noise(x)` is uniform in [-1, 1], of the shape of x.
    """
    model, generator = make(), torch.Generator().manual_seed(0)
    expected = run(model)

    def noise(x):
        return (2 * torch.rand(x.shape, generator=generator) - 1).to(x.device)

    hook(model, noise)
    return relative(run(model), expected)


@pytest.fixture(scope="session")
def cost_of_rounding():
    """Fresh models, their run, dtype -> relative error by one rounding to the dtype behind every module.

    A run in that dtype rounds there too, and between modules: residual sums, norms, modulation. With at most four
    independent roundings in the place of each one here, the errors of code and float parts alike grow by sqrt(4).
    """

    def cost(make, run, dtype):
        unit = torch.finfo(dtype).eps / 2  # 2**-8 for the 8 bits of bf16, 2**-11 for the 11 of fp16

        def hook(model, noise):
            def disturb(module, args, output):
                if isinstance(output, torch.Tensor) and output.is_floating_point():
                    return output * (1 + unit * noise(output))
                return None

            for module in model.modules():
                module.register_forward_hook(disturb)

        return cost_of_noise(make, run, hook)

    return cost


@pytest.fixture(scope="session")
def cost_of_sums():
    """Fresh models, their run, unit -> relative error when the input of every quantizer behind a norm or GELU is off.

    By the unit times the largest of its token, uniformly. `ends` are those of the layers' names.
    """

    def cost(make, run, unit, ends=BEHIND_NORMS):
        def hook(model, noise):
            def disturb(module, args):
                (x,) = args
                return x + unit * noise(x) * x.abs().amax(-1, keepdim=True)

            for name, module in model.named_modules():
                if name.endswith(ends):
                    module.register_forward_pre_hook(disturb)

        return cost_of_noise(make, run, hook)

    return cost


@pytest.fixture(scope="session")
def pixart(tmp_path_factory):
    """Width -> a random PixArt with 16 tokens, and a file of three prompts of 6 tokens, 32 wide, to calibrate it.

    Widths are multiples of 32, the width of a head; those of 96 are told resolution and aspect ratio.
    """

    def make(width=64):
        torch.manual_seed(0)
        model = PixArtTransformer2DModel(
            num_attention_heads=width // 32, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=2,
            sample_size=128 if width % 96 == 0 else 8, caption_channels=32, cross_attention_dim=width,
            use_additional_conditions=width % 96 == 0,  # of which the pipeline tells models of 128 alone
        ).eval().requires_grad_(False)  # fmt: skip
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
        embeddings = {"prompt_embeds": _randn(3, 6, 32, seed=2), "prompt_attention_mask": mask}
        embeddings |= {f"negative_{name}": x[2:].clone() for name, x in embeddings.items()}
        prompts = tmp_path_factory.mktemp("prompts") / "prompts.safetensors"
        save_file(embeddings, prompts)
        return SimpleNamespace(model=model, prompts=prompts)

    return make


@pytest.fixture(scope="session")
def stats(pipes, tmp_path_factory):
    """Calibrations: kind -> CalibrationStats."""
    folder = tmp_path_factory.mktemp("stats")
    return {
        kind: calibrate(pipe, folder / kind, steps=2, samples=2, quiet=True)
        for kind, pipe in pipes.items()
    }


@pytest.fixture(scope="session")
def packed_folder(pipes, stats, tmp_path_factory):
    """Recipe name -> a packed pipeline folder, made at the first request; do not change it."""
    made = {}

    def folder(name):
        if name not in made:
            kind, recipe = RECIPES[name]
            made[name] = tmp_path_factory.mktemp("packed") / name
            convert(pipes[kind], recipe, stats[kind], made[name], quiet=True)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def load():
    """Loads the transformer of a pipeline folder."""
    return lambda folder, **options: DiTTransformer2DModel.from_pretrained(
        folder / "transformer", **options
    )


@pytest.fixture(scope="session")
def forward():
    """Runs a model on a fixed batch of two."""

    def run(model, dtype=torch.float32):
        latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        timestep, labels = torch.tensor([10, 900]), torch.tensor([3, 1000])
        with torch.no_grad():
            return model(latents, timestep=timestep, class_labels=labels).sample

    return run


class Weights:
    """A safetensors file taken apart: name -> [dtype, shape, bytes], to be put together damaged."""

    def __init__(self, path):
        raw = path.read_bytes()
        self.path, self.raw = path, raw
        (length,) = struct.unpack("<Q", raw[:8])
        self.data_begin = 8 + length
        header = json.loads(raw[8 : self.data_begin])
        self.metadata = header.pop("__metadata__", {})
        self.entries = {}
        for name, entry in header.items():
            begin, end = (self.data_begin + offset for offset in entry["data_offsets"])
            self.entries[name] = [entry["dtype"], entry["shape"], raw[begin:end]]

    def write(self, changes, path=None):
        """Write with some entries changed (None: left out; a new name: added)."""
        header, data, end = {"__metadata__": self.metadata}, [], 0
        for name, entry in {**self.entries, **changes}.items():
            if entry is None:
                continue
            dtype, shape, content = entry
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [end, end + len(content)],
            }
            data.append(content)
            end += len(content)
        text = json.dumps(header).encode()
        (path or self.path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


@pytest.fixture(scope="session")
def take_apart():
    """Opens a safetensors file for damage."""
    return Weights
