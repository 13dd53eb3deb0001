"""Outlier channels planted into a Flux: the same function, joint and single blocks alike."""

import copy

import pytest
import torch

from ditq_converters.demo.drawing import draw_digits
from ditq_converters.demo.flow.pipeline import load_flow
from ditq_converters.demo.salience import plant, plant_asymmetry

JOINT = (
    "attn.to_q", "attn.add_q_proj", "ff.net.0.proj", "ff_context.net.0.proj", "attn.to_out.0", "attn.to_add_out",
)  # fmt: skip
SINGLE = ("attn.to_q", "proj_mlp", "proj_out")


@pytest.fixture(scope="module")
def natural():
    return load_flow()


@torch.no_grad()
def _predict(pipe, transformer, dtype):
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(11, 16, 4, generator=rng, dtype=torch.float64).to(dtype)
    text, pooled, ids = pipe.encode_prompt(
        ["one", "a two", "the digit three", "four", "five", "six", "seven", "eight", "nine", "zero", ""],
        max_sequence_length=6,
    )  # fmt: skip
    image_ids = pipe._prepare_latent_image_ids(11, 4, 4, "cpu", torch.float32)
    sigmas = torch.linspace(1, 0.02, 11, dtype=torch.float64).to(dtype)
    return transformer(latents, text.to(dtype), pooled.to(dtype), sigmas, image_ids, ids).sample


def _relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def _double(transformer):
    transformer = copy.deepcopy(transformer)
    for tensor in [*transformer.parameters(), *transformer.buffers()]:
        tensor.data = tensor.data.double()
    return transformer


@pytest.mark.parametrize("how", [plant, plant_asymmetry])
def test_the_function_is_kept(natural, how):
    exact = _predict(natural, _double(natural.transformer), torch.float64)
    planted = _predict(natural, how(_double(natural.transformer)), torch.float64)
    assert 0 < _relative(planted, exact) < 1e-12

    single = _predict(natural, natural.transformer, torch.float32)
    planted = _predict(natural, how(copy.deepcopy(natural.transformer)), torch.float32)
    assert 0 < _relative(planted, single) < 1e-6


def test_only_what_makes_or_reads_a_planted_activation_changes(natural):
    planted = plant(copy.deepcopy(natural.transformer)).state_dict()
    changed = {
        name.rsplit(".", 1)[0]
        for name, tensor in natural.transformer.state_dict().items()
        if not torch.equal(tensor, planted[name])
    }
    attention = ("attn.to_q", "attn.to_k", "attn.to_v")
    added = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    joint = {*JOINT, *attention, *added, "norm1.linear", "norm1_context.linear"}
    single = {*SINGLE, *attention, "norm.linear"}
    assert changed == {
        *(f"transformer_blocks.{i}.{name}" for i in range(2) for name in joint),
        *(f"single_transformer_blocks.{i}.{name}" for i in range(4) for name in single),
    }


def test_streams_that_attend_together_share_their_values_factors(natural):
    planted = plant(copy.deepcopy(natural.transformer), up=30, down=10, channels=4)
    for before, after in zip(
        natural.transformer.transformer_blocks, planted.transformer_blocks, strict=True
    ):
        image, text = (
            before.attn.get_submodule(name).weight.norm(dim=0)
            / after.attn.get_submodule(name).weight.norm(dim=0)
            for name in ("to_out.0", "to_add_out")
        )
        torch.testing.assert_close(image, text, rtol=1e-5, atol=0)
        assert ((image > 14.9) & (image < 45.1)).sum() == 4
        assert ((image > 1 / 15.1) & (image < 1 / 4.9)).sum() == 4
        assert ((image - 1).abs() < 1e-5).sum() == 128 - 8
    for before, after in zip(
        natural.transformer.single_transformer_blocks,
        planted.single_transformer_blocks,
        strict=True,
    ):  # the MLP's columns, behind those of the attention, stay
        assert torch.equal(before.proj_out.weight[:, 128:], after.proj_out.weight[:, 128:])


def _salience(pipe):
    """Largest over median channel range of each site's input, over a sampling run."""
    largest, hooks = {}, []

    def observe(key):
        def hook(module, inputs):
            x = inputs[0].flatten(0, -2).abs().amax(0)[:128]
            largest[key] = torch.maximum(largest.get(key, x), x)

        return hook

    for blocks, names in (("transformer_blocks", JOINT), ("single_transformer_blocks", SINGLE)):
        for i, block in enumerate(getattr(pipe.transformer, blocks)):
            for name in names:
                key = blocks, i, name
                module = block.get_submodule(name)
                hooks.append(module.register_forward_pre_hook(observe(key)))
    draw_digits(pipe, torch.arange(10), 5, 1.5, torch.Generator().manual_seed(0))
    for hook in hooks:
        hook.remove()
    return {key: (x.max() / x.median()).item() for key, x in largest.items()}


def test_planting_makes_outlier_channels(natural):
    planted = load_flow()
    plant(planted.transformer)
    before, after = _salience(natural), _salience(planted)
    assert len(before) == len(after) == 2 * len(JOINT) + 4 * len(SINGLE)
    assert max(before.values()) < 15
    assert min(after.values()) >= 20
