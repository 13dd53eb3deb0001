"""LoRA on packed PixArt, SD3 and Flux: the float model's update through every kind of fold. PEFT is the oracle."""

import copy
import itertools

import pytest
import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)

import ditq_runtime as ditq
from ditq_converters import Recipe, convert
from ditq_converters.convert.fold import block_linears, fold_block, stored_folds
from ditq_converters.convert.pack import make_scheme, pack_model
from ditq_converters.convert.quantize import store_table
from ditq_converters.methods import Transform
from ditq_runtime.families import AdaLN, OnTheFly, family_of
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.site import SITES, SiteFormat

peft = pytest.importorskip("peft")
NAMES = ["pixart-sigma", "sd3.5", "flux-dev"]
GROUPS, BOUNDS = 3, (250.0, 600.0)


def random_transforms(block, table, generator):
    """Factors on every site with a producer, as far as that reaches; shifts per group on AdaLN, one through V."""
    made = {}
    for site in table.sites:
        if isinstance(site.producer, OnTheFly):
            continue
        width = block.get_submodule(site.consumers[0]).in_features
        adaln = isinstance(site.producer, AdaLN)
        reach = width if adaln else block.get_submodule(site.producer.values[0]).out_features
        smooth = torch.ones(width, dtype=torch.float64)
        smooth[:reach] = 0.2 + 5 * torch.rand(reach, generator=generator, dtype=torch.float64)
        shift = torch.zeros(GROUPS if adaln else 1, width, dtype=torch.float64)
        shift[:, :reach] = torch.randn(len(shift), reach, generator=generator, dtype=torch.float64)
        made[site.name] = Transform(smooth, shift)
    return made


def fold_exactly(model):
    """A packed model with random folds in three timestep groups and unquantized weights."""
    family, generator = family_of(type(model).__name__), torch.Generator().manual_seed(0)
    tensors, formats = {}, {}
    for block, table in family.block_tables(model).items():
        module = model.get_submodule(block)
        linears, transforms = (
            block_linears(module, table),
            random_transforms(module, table, generator),
        )
        fold_block(linears, table, transforms)
        for name, linear in linears.items():
            linear.bias = linear.bias.flip(0)
            if name in table.tables:
                stored = store_table(linear)
            else:
                bias = linear.bias.float()
                stored = {
                    "weight": linear.weight.float(),
                    "bias": bias if len(bias) > 1 else bias[0],
                }
                formats[f"{block}.{name}"] = LayerFormat("fp32", "none", groups=len(bias))
            tensors |= {f"{block}.{name}.{field}": tensor for field, tensor in stored.items()}
        for site, stored in stored_folds(linears, table, transforms).items():
            tensors |= {f"{block}.{SITES}.{site}.{f}": t for f, t in stored.items()}
        bounds = family.timestep_scale * torch.tensor(BOUNDS)
        tensors[f"{block}.timestep_groups.bounds"] = bounds
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return pack_model(model, make_scheme(model, family, formats, shapes), tensors, {})


def linears_of(model):
    """Every linear of the blocks, and one outside of them."""
    family = family_of(type(model).__name__)
    inside = [f"{b}.{n}" for b, t in family.block_tables(model).items() for n in t.linears]
    return [*inside, "proj_out"]


def with_peft(model, targets):
    """The float model with a strong random adapter, and that adapter as a file would hold it."""
    tuned = copy.deepcopy(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets), tuned)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    state = peft.get_peft_model_state_dict(tuned)
    layers = {key.rpartition(".lora_")[0] for key in state}
    return tuned.eval(), state | {f"{layer}.alpha": torch.tensor(6.0) for layer in layers}


def error_of(got, truth):
    return float((got - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_passes_every_fold(make_case, run, name):
    model, inputs = make_case(name)
    packed = fold_exactly(model)
    before = run(model, inputs)
    # fp32 through two to four blocks with factors up to 5: some hundred roundings of 6e-8
    assert error_of(run(packed, inputs), before) < 1e-5
    targets = linears_of(model)
    tuned, state = with_peft(model, targets)
    expected = run(tuned, inputs)
    assert error_of(before, expected) > 0.1
    assert sorted(ditq.load_lora(packed, state)) == sorted(targets)
    assert error_of(run(packed, inputs), expected) < 3e-5
    ditq.unload_lora(packed)
    assert error_of(run(packed, inputs), before) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_leaving_out_the_folds_shows(make_case, run, name, monkeypatch):
    model, inputs = make_case(name)
    packed = fold_exactly(model)
    tuned, state = with_peft(model, linears_of(model))
    monkeypatch.setattr(SiteFormat, "is_folded", False)
    ditq.load_lora(packed, state)
    assert error_of(run(packed, inputs), run(tuned, inputs)) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_model_follows_the_tuned_one(make_case, run, name):
    """Data-free W8A8: an error of 1 % without the adapter, which quantizes no worse with it."""
    model, inputs = make_case(name)
    packed = convert(model, Recipe("linear"), quiet=True)
    targets = [t for t in linears_of(model) if "norm" not in t]
    tuned, state = with_peft(model, targets)
    expected = run(tuned, inputs)
    plain = run(packed, inputs)
    ditq.load_lora(packed, state)
    assert error_of(run(packed, inputs), expected) < 0.03 < error_of(plain, expected)
    report = ditq.execution_report(packed, inputs)
    assert report.totals["integer_linears"] == sum(not n.endswith("linear") for n in targets) - 1


@pytest.mark.parametrize("name", NAMES)
def test_plain_peft_is_refused_on_folded_linears(make_case, name):
    model, _ = make_case(name)
    packed = fold_exactly(model)
    config = peft.LoraConfig(r=4, target_modules=["to_q"])
    with pytest.raises(ValueError, match=r"silently wrong; use ditq\.load_lora"):
        peft.inject_adapter_in_model(config, packed)


# -- the verbs of diffusers, each on the float model (PEFT, the oracle) and on a folded one


def state_of(targets, model, seed, rank=4):
    """A random adapter, as a file holds it: alpha is the rank."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name in targets:
        n, k = model.get_submodule(name).weight.shape
        state[f"transformer.{name}.lora_A.weight"] = 0.2 * torch.randn(rank, k, generator=generator)
        state[f"transformer.{name}.lora_B.weight"] = 0.2 * torch.randn(n, rank, generator=generator)
    return state


VERBS = {
    "one of two": lambda m: m.set_adapters("style"),
    "both, weighted": lambda m: m.set_adapters(["style", "again"], [0.5, -2.0]),
    "disabled": lambda m: m.disable_lora(),
    "enabled": lambda m: m.enable_lora(),
    "all off": lambda m: m.disable_adapters(),
    "all on": lambda m: m.enable_adapters(),
    "set_adapter": lambda m: m.set_adapter("again"),
    "one deleted": lambda m: m.delete_adapters("again"),
    "the other": lambda m: m.set_adapters("style", 0.7),
    "unloaded": lambda m: m.unload_lora(),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.filterwarnings("ignore:Adapter again was active")
@pytest.mark.parametrize("name", ["sd3.5", "flux-dev"])
def test_every_verb_acts_as_on_the_float_model(make_case, run, name):
    model, inputs = make_case(name)
    packed, targets = fold_exactly(model), linears_of(model)
    tuned = copy.deepcopy(model)
    for seed, adapter in enumerate(("style", "again")):
        state = state_of(targets, model, seed)
        ditq.load_lora(packed, state, name=adapter)
        tuned.load_lora_adapter(dict(state), adapter_name=adapter)
    seen = []
    for verb, act in VERBS.items():
        act(tuned)
        act(packed)
        for scale in (1.0, 0.0, 0.5) if verb == "both, weighted" else (1.0,):
            given = {**inputs, "joint_attention_kwargs": {"scale": scale}}
            expected = run(tuned, given)
            assert error_of(run(packed, given), expected) < 5e-5, (verb, scale)
            seen.append(expected)
            if scale == 0.0:  # diffusers forgets the weights after it, on the float model
                tuned.set_adapters(["style", "again"], [0.5, -2.0])
                assert error_of(run(packed, inputs), run(tuned, inputs)) < 5e-5
    assert min(error_of(a, b) for a, b in itertools.pairwise(seen)) > 1e-2  # verbs act
    with pytest.raises(ValueError, match="got 'style'"):
        packed.delete_adapters("style")
    assert not hasattr(packed, "peft_config")


def test_load_lora_weights_folds_by_itself(make_case, run):
    """What a pipeline calls: the whole interface of diffusers, with hot swap."""
    model, inputs = make_case("sd3.5")
    packed, targets = fold_exactly(model), linears_of(model)
    tuned = copy.deepcopy(model)
    for m in (tuned, packed):
        m.enable_lora_hotswap(target_rank=8)
    for seed, rank in ((0, 4), (1, 8), (2, 2)):
        state = state_of(targets, model, seed, rank)
        for m in (tuned, packed):
            m.load_lora_adapter(dict(state), adapter_name="style", hotswap=seed > 0)
        assert error_of(run(packed, inputs), run(tuned, inputs)) < 5e-5
    few = state_of(targets[:3], model, 3, 2)
    with pytest.raises(ValueError, match="room for 8"):
        ditq.load_lora(packed, state_of(targets, model, 4, 9), name="style", replace=True)
    ditq.load_lora(packed, few, name="style", replace=True)  # the others get zeros
    alone = fold_exactly(model)
    ditq.load_lora(alone, few)
    # its rank is padded to 8: sums may take another order
    assert error_of(run(packed, inputs), run(alone, inputs)) < 5e-6
    with pytest.raises(ValueError, match="no adapter 'other' to replace"):
        ditq.load_lora(packed, few, name="other", replace=True)
    with pytest.raises(ValueError, match="keep the file"):
        packed.save_lora_adapter("nowhere", "style")
    with pytest.raises(ValueError, match="fuse_lora: not possible"):
        packed.fuse_lora()


def test_a_class_without_verbs_has_those_of_ditq(make_case, run):
    model, inputs = make_case("pixart-sigma")
    packed, targets = fold_exactly(model), linears_of(model)
    plain = run(packed, inputs)
    for seed, adapter in enumerate(("style", "again")):
        ditq.load_lora(packed, state_of(targets, model, seed), name=adapter)
    ditq.set_lora(packed, {"again": 0.5})
    alone = fold_exactly(model)
    ditq.load_lora(alone, state_of(targets, model, 1), scale=0.5)
    assert error_of(run(packed, inputs), run(alone, inputs)) < 1e-6
    ditq.set_lora(packed, {})
    assert torch.equal(run(packed, inputs), plain)
    with pytest.raises(ValueError, match="expected a finite factor of one of style, again"):
        ditq.set_lora(packed, {"other": 1.0})
    with pytest.raises(
        ValueError, match=r"takes none in its attention arguments; use ditq\.set_lora"
    ):
        run(packed, {**inputs, "cross_attention_kwargs": {"scale": 0.5}})
    for name in ("a.b", "", "items"):
        with pytest.raises(ValueError, match="cannot be called"):
            ditq.load_lora(packed, state_of(targets, model, 1), name=name)


def test_an_ip_adapter_of_flux_adds_behind_the_fold(make_case, run):
    """Its values are added after the output projection, so a model with V folded takes it as the float model does."""
    model, inputs = make_case("flux-dev")
    packed = fold_exactly(model)
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(len(inputs["hidden_states"]), 5, 24, generator=generator)
    told = {**inputs, "joint_attention_kwargs": {"ip_hidden_states": [image]}}
    plain = run(model, inputs)
    for each in (model, packed):
        for block in each.transformer_blocks:
            width = block.attn.to_q.in_features
            with torch.random.fork_rng():
                torch.manual_seed(0)
                block.attn.set_processor(FluxIPAdapterAttnProcessor(width, 24, (5,)))
    expected = run(model, told)
    assert error_of(plain, expected) > 0.01
    assert error_of(run(packed, told), expected) < 1e-5
    for block in model.transformer_blocks:  # other tests share it
        block.attn.set_processor(FluxAttnProcessor())
