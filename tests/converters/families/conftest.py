"""Tiny random models of every family with a table, and batches of mixed timesteps for them."""

import copy
import math

import diffusers
import pytest
import torch
from torch import nn

SIZE, CAPTION, TEXT, PROMPTS = 8, 32, 6, 3


def _randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=SIZE,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return model, {
        "hidden_states": _randn(4, 4, SIZE, SIZE),
        "class_labels": torch.tensor([3, 7, 1000, 5]),
    }


def _pixart(additional=False, heads=4, head_dim=24):
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=4, out_channels=8, num_layers=2,
        sample_size=128 if additional else SIZE, patch_size=2, caption_channels=CAPTION,
        cross_attention_dim=heads * head_dim, use_additional_conditions=additional,
    )  # fmt: skip
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] + [0] * 5, [1] * 5 + [0]])
    added = {"resolution": None, "aspect_ratio": None}
    if additional:
        added = {"resolution": _randn(4, 2).abs() * 64, "aspect_ratio": _randn(4, 1).abs()}
    return model, {
        "hidden_states": _randn(4, 4, SIZE, SIZE),
        "encoder_hidden_states": _randn(4, TEXT, CAPTION, seed=2),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": added,
    }


def _sd3(heads=4, head_dim=16, **changes):
    model = diffusers.SD3Transformer2DModel(
        sample_size=SIZE, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=head_dim,
        num_attention_heads=heads, joint_attention_dim=CAPTION, caption_projection_dim=64, pooled_projection_dim=48,
        out_channels=4, pos_embed_max_size=8, **changes,
    )  # fmt: skip
    return model, {
        "hidden_states": _randn(4, 4, SIZE, SIZE),
        "encoder_hidden_states": _randn(4, TEXT, CAPTION, seed=2),
        "pooled_projections": _randn(4, 48, seed=3),
    }


def _flux(guidance=False, heads=4, axes=(4, 6, 6)):
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=sum(axes), num_attention_heads=heads,
        joint_attention_dim=CAPTION, pooled_projection_dim=48, axes_dims_rope=axes, guidance_embeds=guidance,
    )  # fmt: skip
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    inputs = {
        "hidden_states": _randn(4, 16, 16),
        "encoder_hidden_states": _randn(4, TEXT, CAPTION, seed=2),
        "pooled_projections": _randn(4, 48, seed=3),
        "img_ids": grid,
        "txt_ids": torch.zeros(TEXT, 3),
    }
    if guidance:
        inputs["guidance"] = torch.tensor([3.5, 1.0, 3.5, 7.0], dtype=torch.float64)
    return model, inputs


MODELS = {
    "dit": _dit,
    "pixart-alpha": lambda: _pixart(additional=True),
    "pixart-sigma": _pixart,
    "pixart-attention": lambda: _pixart(heads=2, head_dim=32),  # a head dimension with a kernel
    "sd3": _sd3,
    "sd3.5": lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "sd3-attention": lambda: _sd3(2, 32),
    "sd3.5-attention": lambda: _sd3(2, 32, dual_attention_layers=(0,), qk_norm="rms_norm"),
    "flux-schnell": _flux,
    "flux-dev": lambda: _flux(guidance=True),
    "flux-attention": lambda: _flux(heads=2, axes=(8, 12, 12)),
}
TIMESTEPS = (3.0, 250.0, 599.0, 999.0)


@pytest.fixture(scope="session")
def make_case():
    """Name -> (model in eval mode, far from zero initialization; a batch of 4 at mixed timesteps)."""

    def make(name, dtype=torch.float32):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, inputs = MODELS[name]()
            for module in model.modules():
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.normal_(module.bias, std=0.2)
        # Flux is told sigma in [0, 1], the others a training timestep
        scale = 1e-3 if name.startswith("flux") else 1.0
        inputs["timestep"] = scale * torch.tensor(TIMESTEPS, dtype=torch.float64)

        def cast(value):
            if isinstance(value, dict):
                return {key: cast(entry) for key, entry in value.items()}
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        model = model.eval().requires_grad_(False).to(dtype)
        return model, {key: cast(value) for key, value in inputs.items()}

    return make


@pytest.fixture(scope="session")
def run():
    """One forward, as one tensor."""

    def forward(model, inputs):
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    return forward


@pytest.fixture(scope="session")
def cost_of_codes(run):
    """Float model, its packed twin, inputs -> relative error that rounding to the codes of its linears should have.

    Rounding errs by up to half a step, evenly where steps are small beside the values (Bennett, 1948). So the float
    model runs with uniform noise of half a step on every weight and on every quantized input, in units of its own row,
    token or group of 32: steps as docs/methods_details.md has them, none of our code. Root mean square of four runs.
    Errors of independent sources add in energy: what comes out may be sqrt(2) times this only if something else errs as
    much as all roundings together, and 1 / sqrt(2) times only if half of them do not take place.
    """

    def cost(model, packed, inputs):
        truth, scheme = run(model, inputs), packed.config.quantization_config.scheme
        errors = []
        for seed in range(4):
            noisy = copy.deepcopy(model)
            noise = torch.Generator().manual_seed(seed)
            for name in scheme.layers:
                _disturb(noisy.get_submodule(name), scheme.format_of(name), noise)
            errors.append(float((run(noisy, inputs) - truth).norm() / truth.norm()))
        return math.sqrt(sum(e * e for e in errors) / len(errors))

    return cost


def _disturb(linear, layer_format, generator):
    """Half a step of uniform noise on a linear's weight, in place, and on its input, where that is quantized."""

    def half_a_step(x, step):
        return step * (torch.rand(x.shape, generator=generator) - 0.5)

    groups = linear.weight.data
    if layer_format.weights == "w4p":  # 15 steps from the lowest to the highest of a group
        groups = groups.view(len(groups), -1, 32)
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    else:
        step = groups.abs().amax(-1, keepdim=True) / 127
    groups += half_a_step(groups, step)

    def disturb(module, args):
        (x,) = args
        return x + half_a_step(x, x.abs().amax(-1, keepdim=True) / 127)

    if layer_format.integer_gemm:
        linear.register_forward_pre_hook(disturb)


def _embeddings(model):
    """Of three prompts and the empty one, as a pipeline would give them."""
    found = {}
    pooled = 0 if "PixArt" in type(model).__name__ else model.config.pooled_projection_dim
    names = ("prompt_embeds", "pooled_prompt_embeds" if pooled else "prompt_attention_mask")
    for seed, (name, width) in enumerate(zip(names, (CAPTION, pooled), strict=True)):
        if name == "prompt_attention_mask":
            mask = torch.ones(PROMPTS, TEXT, dtype=torch.long)
            mask[1, 3:] = 0
            found[name], found[f"negative_{name}"] = (
                mask,
                mask[1:2] * 0 + (torch.arange(TEXT) < 1),
            )
            continue
        shape = (TEXT, width) if name == "prompt_embeds" else (width,)
        found[name] = _randn(PROMPTS, *shape, seed=seed).float()
        found[f"negative_{name}"] = _randn(1, *shape, seed=10 + seed).float()
    return found


@pytest.fixture(scope="session")
def embeddings():
    """Of three prompts and the empty one for a model, as a pipeline would give them: name -> tensor."""
    return _embeddings
