"""Planted outlier channels: the same function, and real outliers."""

import copy

import pytest
import torch

from ditq_converters.demo import open_demo
from ditq_converters.demo.pipeline import load_transformer
from ditq_converters.demo.salience import plant

SITES = ("attn1.to_q", "ff.net.0.proj", "attn1.to_out.0")


@pytest.fixture(scope="module")
def natural():
    return load_transformer()


@torch.no_grad()
def _predict(transformer, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(22, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    timesteps = torch.arange(22) * 999 // 21
    labels = torch.tensor([*range(10), 1000]).repeat(2)
    return transformer(x, timestep=timesteps, class_labels=labels).sample


def _relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def _double(transformer):
    transformer = copy.deepcopy(transformer)
    for tensor in [*transformer.parameters(), *transformer.buffers()]:
        tensor.data = tensor.data.double()
    return transformer


def _salience(name):
    """Largest over median channel range of each site's input, over a whole sampling run."""
    pipe = open_demo(name)
    pipe.set_progress_bar_config(disable=True)
    ranges = {}

    def observe(key):
        def hook(module, inputs):
            absmax = inputs[0].abs().flatten(0, -2).amax(0)
            ranges[key] = torch.maximum(ranges.get(key, absmax), absmax)

        return hook

    for layer, block in enumerate(pipe.transformer.transformer_blocks):
        for site in SITES:
            block.get_submodule(site).register_forward_pre_hook(observe((layer, site)))
    generator = torch.Generator().manual_seed(0)
    pipe([*range(10)], guidance_scale=1.5, num_inference_steps=10, generator=generator)
    return {key: (value.max() / value.median()).item() for key, value in ranges.items()}


def test_the_function_is_exactly_kept_in_fp64(natural):
    expected = _predict(_double(natural), torch.float64)
    planted = _predict(plant(_double(natural)), torch.float64)
    assert _relative(planted, expected) < 1e-12


def test_the_function_is_kept_in_fp32_to_rounding(natural):
    expected = _predict(natural, torch.float32)
    planted = _predict(plant(copy.deepcopy(natural)), torch.float32)
    # fp32 itself is this far from fp64 (6 blocks of sums over 128); planting may double it
    own_error = _relative(expected.double(), _predict(_double(natural), torch.float64))
    assert 0 < _relative(planted, expected) < 3 * own_error < 5e-6


def test_planting_makes_outlier_channels():
    natural, salient = _salience("demo:digits"), _salience("demo:digits-salient")
    assert natural.keys() == salient.keys()
    assert len(natural) == 6 * len(SITES)
    assert max(natural.values()) < 10
    assert min(salient.values()) >= 30


def test_planting_is_in_place_and_the_same_every_time(natural):
    first, second = copy.deepcopy(natural), copy.deepcopy(natural)
    assert plant(first) is first
    torch.manual_seed(7)
    plant(second)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])


def test_the_planted_factors_are_within_their_ranges(natural):
    planted = plant(copy.deepcopy(natural), up=30, down=10, channels=4)
    for before, after in zip(natural.transformer_blocks, planted.transformer_blocks, strict=True):
        columns_before = before.ff.net[0].proj.weight.norm(dim=0)
        ratio = columns_before / after.ff.net[0].proj.weight.norm(dim=0)  # the factors
        assert ((ratio > 14.9) & (ratio < 45.1)).sum() == 4
        assert ((ratio > 1 / 15.1) & (ratio < 1 / 4.9)).sum() == 4
        assert ((ratio - 1).abs() < 1e-6).sum() == 128 - 8


@pytest.mark.parametrize("wrong", [{"channels": 65}, {"channels": -1}, {"up": 0}, {"down": -1}])
def test_impossible_requests_are_refused(natural, wrong):
    with pytest.raises(ValueError, match="plant: needs"):
        plant(natural, **wrong)
