"""Planted outlier channels and offsets: the same function, and activations that are hard to quantize."""

import copy

import pytest
import torch

from ditq_converters.demo import open_demo
from ditq_converters.demo.pipeline import load_transformer
from ditq_converters.demo.salience import plant, plant_asymmetry

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


def _ranges(name):
    """(min, max) [128] of each site's input, over a whole sampling run."""
    pipe = open_demo(name)
    pipe.set_progress_bar_config(disable=True)
    ranges = {}

    def observe(key):
        def hook(module, inputs):
            x = inputs[0].flatten(0, -2)
            low, high = ranges.get(key, (x[0], x[0]))
            ranges[key] = torch.minimum(low, x.amin(0)), torch.maximum(high, x.amax(0))

        return hook

    for layer, block in enumerate(pipe.transformer.transformer_blocks):
        for site in SITES:
            block.get_submodule(site).register_forward_pre_hook(observe((layer, site)))
    generator = torch.Generator().manual_seed(0)
    pipe([*range(10)], guidance_scale=1.5, num_inference_steps=10, generator=generator)
    return ranges


def _salience(name):
    """Largest over median channel range of each site's input."""
    absmax = {key: torch.maximum(-low, high) for key, (low, high) in _ranges(name).items()}
    return {key: (value.max() / value.median()).item() for key, value in absmax.items()}


def _asymmetry(name):
    """|middle| / half range of every channel of each site's input, largest first: [128]."""
    asymmetry = {}
    for key, (low, high) in _ranges(name).items():
        asymmetry[key] = ((high + low).abs() / (high - low)).sort(descending=True).values
    return asymmetry


@pytest.mark.parametrize("how", [plant, plant_asymmetry])
def test_the_function_is_exactly_kept_in_fp64(natural, how):
    expected = _predict(_double(natural), torch.float64)
    planted = _predict(how(_double(natural)), torch.float64)
    assert 0 < _relative(planted, expected) < 1e-12


@pytest.mark.parametrize("how", [plant, plant_asymmetry])
def test_the_function_is_kept_in_fp32_to_rounding(natural, how):
    expected = _predict(natural, torch.float32)
    planted = _predict(how(copy.deepcopy(natural)), torch.float32)
    # fp32 itself is this far from fp64 (6 blocks of sums over 128); planting may double it
    own_error = _relative(expected.double(), _predict(_double(natural), torch.float64))
    assert 0 < _relative(planted, expected) < 3 * own_error < 5e-6


def test_planting_makes_outlier_channels():
    natural, salient = _salience("demo:digits"), _salience("demo:digits-salient")
    assert natural.keys() == salient.keys()
    assert len(natural) == 6 * len(SITES)
    assert max(natural.values()) < 10
    assert min(salient.values()) >= 30


def test_planting_makes_asymmetric_channels():
    natural, planted = _asymmetry("demo:digits"), _asymmetry("demo:digits-asymmetric")
    assert len(natural) == len(planted) == 6 * len(SITES)
    for key, before in natural.items():
        assert before.median() < 0.5
        assert before[0] < 3
        after = planted[key]
        assert (
            after[3] > 4
        )  # the middle lies over 4 half ranges from zero, of half the planted ones
        assert after[7] > 1 or after[7] > before[0] / 2  # all 8
        assert after[:8].mean() > 4 * before[:8].mean()
        assert after[20:].median() < 0.5  # the others are as they were
    outliers = _salience("demo:digits-asymmetric")
    assert min(outliers.values()) >= 30


@pytest.mark.parametrize("how", [plant, plant_asymmetry])
def test_planting_is_in_place_and_the_same_every_time(natural, how):
    first, second = copy.deepcopy(natural), copy.deepcopy(natural)
    assert how(first) is first
    torch.manual_seed(7)
    how(second)
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


@pytest.mark.parametrize("channels", [43, 65])
def test_asymmetry_needs_room_for_three_sets_of_channels(natural, channels):
    with pytest.raises(ValueError, match="plant_asymmetry: needs"):
        plant_asymmetry(natural, channels=channels)


@pytest.mark.parametrize("wrong", [{"channels": 65}, {"channels": -1}, {"up": 0}, {"down": -1}])
def test_impossible_requests_are_refused(natural, wrong):
    with pytest.raises(ValueError, match="plant: needs"):
        plant(natural, **wrong)


def test_the_offsets_reach_every_site_through_biases_alone(natural):
    salient, shifted = plant(copy.deepcopy(natural)), plant_asymmetry(copy.deepcopy(natural))
    changed = {
        name
        for name, tensor in shifted.state_dict().items()
        if not torch.equal(tensor, salient.state_dict()[name])
    }
    sites = (
        "norm1.linear",
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "ff.net.0.proj",
    )
    assert changed == {f"transformer_blocks.{i}.{name}.bias" for i in range(6) for name in sites}
    for before, after in zip(salient.transformer_blocks, shifted.transformer_blocks, strict=True):
        moved = (after.norm1.linear.bias - before.norm1.linear.bias).reshape(6, 128)
        assert (moved != 0).sum(1).tolist() == [8, 0, 0, 8, 0, 0]  # shift_msa and shift_mlp
        small = moved[moved != 0].abs().reshape(2, 8).sort(dim=1).values[:, :4]
        assert bool(((small > 5.99) & (small < 18.01)).all())  # 12 * U(0.5, 1.5) where f = 1
        with_them = after.attn1.to_q.bias + after.attn1.to_q.weight @ moved[0]
        torch.testing.assert_close(with_them, before.attn1.to_q.bias, rtol=0, atol=2e-5)
