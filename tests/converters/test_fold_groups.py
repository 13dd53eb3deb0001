"""Shifts per timestep group fold exactly too, on the device, for batches of mixed timesteps."""

import copy

import pytest
import torch
from torch import nn

from ditq_converters.calibrate.stats import StatisticsError
from ditq_converters.convert.fold import LinearTensors, block_linears, fold_block
from ditq_converters.convert.groups import group_bounds
from ditq_converters.methods import Transform
from ditq_runtime.families.dit import BLOCK, DIT
from ditq_runtime.families.sites import TIMESTEP_GROUPS
from ditq_runtime.layers.carrier import here
from ditq_runtime.layers.timestep_groups import TimestepGroups, group_index, of_groups

WIDTH, GROUPS = 64, 3
BOUNDS = (250.0, 600.0)
EXACT = (
    1e-12  # fp64 rounds to 1.1e-16; sums of 256 terms, factors up to 5, shifts up to 3, two blocks
)


class GroupedLinear(nn.Module):
    """An fp64 linear whose bias is chosen by the block's group index: the oracle of a packed layer."""

    def __init__(self, tensors: LinearTensors, left=None):
        super().__init__()
        self.weight = nn.Parameter(tensors.weight)
        zeros = torch.zeros(1, len(tensors.weight), dtype=torch.float64)
        self.bias = nn.Parameter(zeros if tensors.bias is None else tensors.bias)
        self.smooth = 1 if left is None else left.smooth

    def forward(self, x):
        bias = self.bias[here().index] if len(self.bias) > 1 else self.bias
        bias = bias if x.dim() == 2 else bias[:, None]
        return (x / self.smooth) @ self.weight.t() + bias


def random_transforms(generator, smooth=True, shift=True):
    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    result = {}
    for site, groups in (("qkv", GROUPS), ("o_proj", 1), ("fc1", GROUPS), ("fc2", 0)):
        width = 4 * WIDTH if site == "fc2" else WIDTH
        s = 0.2 + 4.8 * draw(width) if smooth else None
        z = 6 * draw(groups, width) - 3 if shift and groups else None
        result[site] = Transform(s, z)
    return result


def folded_copy(model, transforms):
    folded = copy.deepcopy(model)
    for name in DIT.block_names(model):
        block = folded.get_submodule(name)
        linears = block_linears(model.get_submodule(name), BLOCK)
        on_the_fly = fold_block(linears, BLOCK, transforms[name])
        BLOCK.use_direct_multiplier(block)
        groups = TimestepGroups(GROUPS, device="cpu")
        # the tables run by call, noisiest first; the runtime counts groups by rising timestep
        groups.bounds.data = torch.tensor(BOUNDS)
        setattr(block, TIMESTEP_GROUPS, groups)
        for layer, tensors in linears.items():
            tensors.bias = None if tensors.bias is None else tensors.bias.flip(0)
            parent, _, leaf = layer.rpartition(".")
            grouped = GroupedLinear(tensors, on_the_fly.get(layer))
            setattr(block.get_submodule(parent), leaf, grouped)
    return folded


@pytest.mark.parity("P1", "P19")
@pytest.mark.parametrize(("smooth", "shift"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("attention_bias", [True, False])
def test_the_grouped_model_is_the_same_function(make_dit, smooth, shift, attention_bias):
    model = make_dit(attention_bias=attention_bias).double()
    generator = torch.Generator().manual_seed(5)
    transforms = {
        name: random_transforms(generator, smooth, shift) for name in DIT.block_names(model)
    }
    folded = folded_copy(model, transforms)
    latents = torch.randn(4, 4, 8, 8, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([3, 250, 599, 999])  # groups 0, 0, 1, 2 by rising timestep
    labels = torch.tensor([1, 2, 3, 1000])
    with torch.no_grad():
        truth = model(latents, timestep=timesteps, class_labels=labels).sample
        mixed = folded(latents, timestep=timesteps, class_labels=labels).sample
        positional = folded(latents, timesteps, labels).sample
        single = folded(latents[1:2], timestep=timesteps[1:2], class_labels=labels[1:2]).sample
    assert float((mixed - truth).abs().max() / truth.abs().max()) < EXACT
    assert torch.equal(positional, mixed)
    torch.testing.assert_close(single, mixed[1:2], rtol=1e-12, atol=1e-12)
    index = folded.transformer_blocks[0].timestep_groups
    assert index(timesteps).tolist() == [0, 0, 1, 2]


def test_the_test_would_see_groups_that_disagree(make_dit):
    """Producer and consumers on different groups: the shift that was taken is not the one that comes back."""
    model = make_dit().double()
    generator = torch.Generator().manual_seed(5)
    transforms = {name: random_transforms(generator) for name in DIT.block_names(model)}
    folded = folded_copy(model, transforms)
    block = folded.transformer_blocks[0]
    block.attn1.to_q.bias.data = block.attn1.to_q.bias.data.flip(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    arguments = {"timestep": torch.tensor([3, 999]), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        truth, wrong = model(latents, **arguments).sample, folded(latents, **arguments).sample
    assert float((wrong - truth).abs().max() / truth.abs().max()) > 1e-6


def test_a_shift_that_no_producer_takes_is_left_to_the_quantizer(make_dit):
    block = make_dit().double().transformer_blocks[0]
    linears = block_linears(block, BLOCK)
    shift = torch.linspace(-1, 1, 2 * 4 * WIDTH, dtype=torch.float64).reshape(2, -1)
    left = fold_block(linears, BLOCK, {"fc2": Transform(None, shift)})
    assert left.keys() == {"ff.net.2"}
    assert torch.equal(left["ff.net.2"].shift, shift)
    second = block.ff.net[2]
    expected = second.bias + shift @ second.weight.T  # b + W z_g
    assert float((linears["ff.net.2"].bias - expected).abs().max()) < EXACT


@pytest.mark.parity("P19")
def test_boundaries_lie_midway_and_rise():
    bounds = group_bounds([900.0, 700.0, 400.0, 380.0, 20.0], (0, 0, 1, 1, 2))
    assert bounds.tolist() == [200.0, 550.0]
    assert bounds.dtype == torch.float32
    assert group_bounds([900.0, 700.0], (0, 0)).tolist() == []
    assert group_bounds([0.25, 0.5, 1.0], (1, 1, 0)).tolist() == [
        0.75
    ]  # it rises while noise falls


def test_timesteps_that_do_not_fall_are_refused():
    with pytest.raises(StatisticsError, match="fall at every call"):
        group_bounds([900.0, 900.0, 20.0], (0, 1, 1))
    with pytest.raises(StatisticsError, match="or rise at every call"):
        group_bounds([900.0, 20.0, 30.0], (0, 1, 1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_any_dtype_and_one_timestep_for_all(dtype):
    groups = TimestepGroups(3, device="cpu")
    groups.bounds.data = torch.tensor(BOUNDS)
    assert groups(torch.tensor(999, dtype=dtype).expand(4)).tolist() == [2]
    groups(torch.tensor(-5, dtype=dtype))
    table = torch.arange(6.0).reshape(3, 2)
    assert of_groups(table, 3).tolist() == [[0.0, 1.0]] * 3
    here().index = None


def test_a_timestep_for_each_token():
    """[B, L] of a model that denoises its tokens unevenly; layers that read other tokens have no group."""
    groups = TimestepGroups(3, device="cpu")
    groups.bounds.data = torch.tensor(BOUNDS)
    assert groups(torch.tensor([[999, 0, 599], [0, 0, 999]])).tolist() == [[2, 0, 1], [0, 0, 2]]
    assert group_index(6).tolist() == [2, 0, 1, 0, 0, 2]
    table = torch.arange(3.0)[:, None]
    assert of_groups(table, 6).flatten().tolist() == [2, 0, 1, 0, 0, 2]
    with pytest.raises(ValueError, match=r"each of \[2, 3\] tokens, and this layer reads 12 rows"):
        of_groups(table, 12)
    assert groups(torch.tensor([[999], [0]])).tolist() == [2, 0]  # one a sample after all
    here().index = None
    with pytest.raises(ValueError, match="no timestep reached the block"):
        groups()


@pytest.mark.parity("P19")
def test_groups_switch_at_the_boundary_and_other_step_counts_map_by_timestep():
    groups = TimestepGroups(3, device="cpu")
    groups.bounds.data = group_bounds([900.0, 700.0, 400.0, 380.0, 20.0], (0, 0, 1, 1, 2))
    just_above = torch.nextafter(torch.tensor(550.0), torch.tensor(600.0)).item()
    assert groups(torch.tensor([550.0, just_above, 200.0, 200.1])).tolist() == [1, 2, 0, 1]
    # seven steps, where five were calibrated
    steps = torch.tensor([999, 833, 666, 500, 333, 166, 0])
    assert groups(steps).tolist() == [2, 2, 2, 1, 1, 0, 0]


def test_boundaries_survive_casts():
    groups = TimestepGroups(2, device="cpu")
    groups.bounds.data = torch.tensor([500.25])
    assert groups.bfloat16().bounds.dtype == torch.float32
    assert groups.half().bounds.item() == 500.25
