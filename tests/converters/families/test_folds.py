"""Every fold of every table is exact: random factors, shifts in three timestep groups, mixed timesteps in a batch."""

import copy

import pytest
import torch
from torch import nn

from ditq_converters.convert.fold import block_linears, fold_block
from ditq_converters.methods import Transform
from ditq_runtime.families import AdaLN, OnTheFly, ValueRows, family_of
from ditq_runtime.families.sites import TIMESTEP_GROUPS
from ditq_runtime.layers.carrier import carry, here
from ditq_runtime.layers.modulation_table import ModulationTable
from ditq_runtime.layers.timestep_groups import TimestepGroups

GROUPS, BOUNDS = 3, (250.0, 600.0)
NAMES = ["dit", "pixart-alpha", "pixart-sigma", "sd3", "sd3.5", "flux-schnell", "flux-dev"]
# fp64 rounds to 1.1e-16; sums of 320 terms, factors up to 5, shifts up to 3, four blocks. Flux rounds q and k to fp32
# for its rotary embedding: equal values round alike, and one in a billion stands on a rounding boundary.
EXACT = 1e-12


class GroupedLinear(nn.Module):
    """An fp64 linear whose bias is chosen by the block's group index: the oracle of a packed layer."""

    def __init__(self, tensors, left):
        super().__init__()
        self.weight = nn.Parameter(tensors.weight, requires_grad=False)
        zeros = torch.zeros(1, len(tensors.weight), dtype=torch.float64)
        bias = zeros if tensors.bias is None else tensors.bias
        self.bias = nn.Parameter(bias.flip(0), requires_grad=False)
        self.left = left or Transform()

    def forward(self, x):
        bias = self.bias[here().index] if len(self.bias) > 1 else self.bias
        bias = bias if x.dim() == 2 else bias[:, None]
        if self.left.shift is not None:
            shift = self.left.shift.flip(0)
            shift = shift[here().index] if len(shift) > 1 else shift
            x = x - (shift if x.dim() == 2 else shift[:, None])
        smooth = 1 if self.left.smooth is None else self.left.smooth
        return (x / smooth) @ self.weight.t() + bias


def random_transform(site, block, width, generator, shift):
    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    s, z = 0.2 + 4.8 * draw(width), None
    if shift and (isinstance(site.producer, AdaLN) or takes_groups(site)):
        z = 6 * draw(GROUPS, width) - 3
    elif shift and isinstance(site.producer, ValueRows):
        values = block.get_submodule(site.producer.values[0]).out_features
        z = torch.zeros(1, width, dtype=torch.float64)
        z[:, :values] = 6 * draw(1, values) - 3
    return Transform(s, z)


def takes_groups(site):
    return isinstance(site.producer, OnTheFly) and site.producer.takes_shift


def folded_copy(model, family, generator, shift=True, only=None):
    folded = copy.deepcopy(model)
    for name, table in family.block_tables(model).items():
        source, block = model.get_submodule(name), folded.get_submodule(name)
        transforms = {
            site.name: random_transform(
                site, source, source.get_submodule(site.consumers[0]).in_features, generator, shift
            )
            for site in table.sites
            if only is None or site.name in only
        }
        linears = block_linears(source, table)
        on_the_fly = fold_block(linears, table, transforms)
        groups = TimestepGroups(GROUPS, device="cpu")
        groups.bounds.data = family.timestep_scale * torch.tensor(BOUNDS)
        setattr(block, TIMESTEP_GROUPS, groups)
        for layer, tensors in linears.items():
            parent, _, leaf = layer.rpartition(".")
            if layer in table.tables:
                delattr(block, layer)
                module = ModulationTable(len(tensors.weight), len(tensors.bias), "cpu").double()
                module.weight.data = tensors.weight[:, 0]
                bias = tensors.bias.flip(0)
                module.bias.data = bias if len(bias) > 1 else bias[0]
            else:
                module = GroupedLinear(tensors, on_the_fly.get(layer))
            setattr(block.get_submodule(parent), leaf, module)
        table.use_direct_multiplier(block)
    carry(folded, "timestep")
    return folded


def relative(got, truth):
    return float((got - truth).abs().max() / truth.abs().max())


@pytest.mark.parity("P1")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [True, False])
def test_a_folded_model_is_the_same_function(make_case, run, name, shift):
    model, inputs = make_case(name, torch.float64)
    family = family_of(type(model).__name__)
    folded = folded_copy(model, family, torch.Generator().manual_seed(5), shift)
    truth = run(model, inputs)
    assert truth.dtype == torch.float64
    assert relative(run(folded, inputs), truth) < EXACT
    first = folded.get_submodule(family.block_names(model)[0])
    assert getattr(first, TIMESTEP_GROUPS)(inputs["timestep"]).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_a_mixed_batch_is_the_sample_alone(make_case, run, name):
    model, inputs = make_case(name, torch.float64)
    folded = folded_copy(model, family_of(type(model).__name__), torch.Generator().manual_seed(5))
    shared = ("img_ids", "txt_ids")

    def pick(key, value):
        if isinstance(value, dict):
            return {k: pick(k, v) for k, v in value.items()}
        return value if key in shared or value is None else value[2:3]

    alone = run(folded, {key: pick(key, value) for key, value in inputs.items()})
    assert relative(alone, run(folded, inputs)[2:3]) < EXACT


@pytest.mark.parametrize("name", NAMES)
def test_the_test_would_see_groups_that_disagree(make_case, run, name):
    """Producer and consumers on different groups: the shift that was taken is not the one that comes back."""
    model, inputs = make_case(name, torch.float64)
    folded = folded_copy(model, family_of(type(model).__name__), torch.Generator().manual_seed(5))
    # not q or k: a constant on all keys moves no softmax
    grouped = [
        m
        for n, m in folded.named_modules()
        if isinstance(m, GroupedLinear) and len(m.bias) > 1 and n.endswith("ff.net.0.proj")
    ]
    grouped[0].bias.data = grouped[0].bias.data.flip(0)
    assert relative(run(folded, inputs), run(model, inputs)) > 1e-4


def test_a_deep_copy_notes_its_own_timestep(make_case, run):
    model, inputs = make_case("pixart-sigma", torch.float64)
    folded = folded_copy(model, family_of(type(model).__name__), torch.Generator().manual_seed(5))
    twin = copy.deepcopy(folded)
    expected = run(folded, inputs)
    run(twin, {**inputs, "timestep": inputs["timestep"].flip(0)})
    assert torch.equal(run(twin, inputs), expected)
    positional = folded(
        inputs["hidden_states"], inputs["encoder_hidden_states"], inputs["timestep"], None, None, None,
        inputs["encoder_attention_mask"],
    ).sample  # fmt: skip
    assert torch.equal(positional, expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_table_lists_every_linear_of_its_blocks_once(make_case, name):
    model, _ = make_case(name)
    family = family_of(type(model).__name__)
    tables = family.block_tables(model)
    for block_name, table in tables.items():
        block = model.get_submodule(block_name)
        linears = {
            n for n, m in block.named_modules() if isinstance(m, nn.Linear) and "norm1.emb" not in n
        }
        assert sorted(table.linears) == sorted(linears)
        assert len({site.name for site in table.sites}) == len(table.sites)
        for site in table.sites:
            widths = {block.get_submodule(n).in_features for n in site.consumers}
            assert len(widths) == 1
            assert set(site.observed) <= set(site.consumers)
    outside = {
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and not n.startswith(tuple(f"{b}." for b in tables))
    }
    assert family.final_modulation is None or family.final_modulation in outside
    outside -= {family.final_modulation}
    assert outside
    assert all(any(part in n for part in family.kept) for n in outside)


@pytest.mark.parametrize("name", NAMES)
def test_observed_consumers_see_the_whole_site(make_case, run, name):
    """Readers of one site read one tensor, unless they are its streams."""
    model, inputs = make_case(name)
    seen = {}
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, layer=layer: seen.update({layer: args[0]})
            )
    run(model, inputs)
    for block, table in family_of(type(model).__name__).block_tables(model).items():
        for site in table.sites:
            tensors = [seen[f"{block}.{consumer}"] for consumer in site.consumers]
            for consumer, tensor in zip(site.consumers, tensors, strict=True):
                alone = consumer in site.streams or consumer == site.consumers[0]
                same = tensor.shape == tensors[0].shape and torch.equal(tensor, tensors[0])
                assert same or (alone and bool(site.streams))
            if len(site.streams) > 1:
                assert tensors[0].shape != tensors[1].shape


@pytest.mark.parametrize("name", NAMES)
def test_example_inputs_fit_the_model(make_case, name):
    model, _ = make_case(name)
    family = family_of(type(model).__name__)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            out = model.to(dtype)(**family.example_inputs(model)).sample
        assert out.dtype == dtype
        assert bool(torch.isfinite(out).all())
