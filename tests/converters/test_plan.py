"""The plan: every linear once, with its format, its fold and its reason."""

import pytest
import torch
from torch import nn

from ditq_converters import Recipe, calibrate, convert
from ditq_converters.plan.layers import plan_layers, transforms
from ditq_runtime.families import family_of
from ditq_runtime.families.dit import BLOCK

FAMILY = family_of("DiTTransformer2DModel")
CONSUMERS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
)


def plan(model, **fields):
    return {entry.name: entry for entry in plan_layers(model, FAMILY, Recipe(**fields))}


def test_every_linear_appears_once(make_dit):
    model = make_dit(num_layers=3)
    names = [entry.name for entry in plan_layers(model, FAMILY, Recipe())]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(names) == len(set(names))
    assert sorted(names) == sorted(linears)
    # per block 6 consumers, 1 modulation, 2 of the timestep embedder; final modulation and projection
    assert len(names) == 3 * 9 + 2


def test_block_order_is_numeric(make_dit):
    blocks = FAMILY.block_names(make_dit(num_layers=11))
    assert blocks == [f"transformer_blocks.{i}" for i in range(11)]


def test_parameters_are_counted(make_dit):
    model = make_dit()
    entries = plan_layers(model, FAMILY, Recipe())
    modules = dict(model.named_modules())
    for entry in entries:
        linear = modules[entry.name]
        assert entry.parameters == (linear.in_features + 1) * linear.out_features


@pytest.mark.parametrize("weights", ["w8", "w4p"])
@pytest.mark.parametrize("activations", ["token", "static"])
def test_formats(make_dit, weights, activations):
    entries = plan(make_dit(), weights=weights, activations=activations)
    group = 64 if weights == "w4p" else None
    for name in CONSUMERS:
        layer_format = entries[f"transformer_blocks.1.{name}"].format
        assert (layer_format.weights, layer_format.activations) == (weights, activations)
        assert layer_format.group_size == group
        assert layer_format.smooth == (name == "ff.net.2")  # only GELU's output has no producer
        assert layer_format.bias
    modulation = entries["transformer_blocks.1.norm1.linear"].format
    assert (modulation.weights, modulation.activations) == (weights, "none")
    assert (modulation.smooth, modulation.bias) == (False, True)
    final = entries["proj_out_1"].format  # no block follows to drown its error
    assert (final.weights, final.activations) == ("w8", "none")
    kept = plan(make_dit(), weights=weights, keep=("proj_out_1",))["proj_out_1"].format
    assert kept.weights == "fp32"


def test_kinds_and_reasons(make_dit):
    entries = plan(make_dit())
    block = "transformer_blocks.0"
    kinds = {name: entries[f"{block}.{name}"].kind for name in CONSUMERS}
    assert list(kinds.values()) == ["K1", "K1", "K1", "V", "K1", "G"]
    assert "norm1.linear" in entries[f"{block}.attn1.to_q"].fold
    assert "attn1.to_v" in entries[f"{block}.attn1.to_out.0"].fold
    assert "GELU" in entries[f"{block}.ff.net.2"].fold
    outside = [entry for entry in entries.values() if entry.format is None]
    assert {entry.site for entry in outside} == {"outside the table"}
    assert len(outside) == 2 * 2 + 1
    assert all("float" in entry.fold for entry in outside)
    assert {
        entry.fold for entry in plan(make_dit(), method="linear").values() if entry.kind != "-"
    } == {"no transform"}


def test_layers_without_bias_say_so(make_dit):
    entries = plan(make_dit(attention_bias=False))
    block = "transformer_blocks.0"
    assert not entries[f"{block}.attn1.to_q"].format.bias
    assert entries[f"{block}.attn1.to_out.0"].format.bias


def test_modulation_has_its_own_weights(make_dit):
    entries = plan(make_dit(), weights="w4p", modulation="w8")
    assert entries["transformer_blocks.0.norm1.linear"].format.weights == "w8"
    assert entries["transformer_blocks.0.attn1.to_q"].format.weights == "w4p"


def test_kept_layers_stay_float(make_dit):
    entries = plan(make_dit(), weights="w4p", keep=("*.1.ff.*", "*.norm1.linear"))
    for name, entry in entries.items():
        if entry.format is None:
            continue
        kept = ".1.ff." in name or name.endswith("norm1.linear")
        assert (entry.format.weights == "fp32") == kept
        if kept:
            assert (entry.format.activations, entry.format.group_size) == ("none", None)


def test_a_site_is_smoothed_while_one_reader_is_quantized(make_dit):
    sites = {site.name: site for site in BLOCK.sites}
    some = Recipe(keep=("*.to_q", "*.ff.net.2"))
    assert transforms(some, "transformer_blocks.0", sites["qkv"])
    assert not transforms(some, "transformer_blocks.0", sites["fc2"])
    assert not transforms(Recipe(keep=("*.0.attn1.to_?",)), "transformer_blocks.0", sites["qkv"])
    assert transforms(Recipe(keep=("*.0.attn1.to_?",)), "transformer_blocks.1", sites["qkv"])
    assert not transforms(Recipe(method="linear"), "transformer_blocks.0", sites["qkv"])


@pytest.mark.parametrize("pattern", ["nothing.*", "proj_out_2", "to_q", "*.norm1.emb.*"])
def test_a_keep_pattern_that_matches_nothing_is_refused(make_dit, pattern):
    """Embedders and the final projection are float already: a pattern for them would be a misunderstanding."""
    with pytest.raises(
        ValueError, match=r"matches none of the 15 quantized modules; see `ditq inspect`"
    ):
        plan(make_dit(), keep=("*.to_q", pattern))


@pytest.mark.parametrize(
    ("requested", "narrow", "wide"), [(32, 32, 32), (64, 32, 64), (128, 32, 128), (512, 96, 384)]
)
def test_group_sizes_fall_back_to_a_divisor(make_dit, requested, narrow, wide):
    """96 inputs and 384: the largest multiple of 32 that divides and is at most what was asked."""
    model = make_dit(num_attention_heads=6)  # 6 x 16 = 96
    entries = plan(model, weights="w4p", group_size=requested)
    narrow = 96 if requested >= 96 else narrow
    assert entries["transformer_blocks.0.attn1.to_q"].format.group_size == narrow
    assert entries["transformer_blocks.0.ff.net.2"].format.group_size == wide
    assert entries["transformer_blocks.0.norm1.linear"].format.group_size == narrow


def test_where_no_group_divides_real_groups_take_a_scale_per_channel(make_dit):
    """48 inputs: one group of all, and the format says so; 192 inputs still have groups."""
    entries = plan(make_dit(num_attention_heads=3), weights="w4g", group_size=128)
    assert entries["transformer_blocks.0.attn1.to_q"].format.name == "w4g48_token"
    assert entries["transformer_blocks.0.norm1.linear"].format.name == "w4g48_weight_only"
    assert entries["transformer_blocks.0.ff.net.2"].format.group_size == 96


def test_inputs_that_no_group_divides_are_refused_with_the_remedy(make_dit):
    model = make_dit(num_attention_heads=3)  # 48 inputs
    with pytest.raises(
        ValueError, match=r"attn1\.to_q: .*K=48.*--keep 'transformer_blocks\.0\.attn1\.to_q'"
    ):
        plan(model, weights="w4p")
    plan(model, weights="w8")
    narrow = ("*.to_?", "*.to_out.0", "*.ff.net.0.proj", "*.norm1.linear")
    entries = plan(model, weights="w4p", keep=narrow)
    assert entries["transformer_blocks.0.ff.net.2"].format.group_size == 64  # 192 inputs


@pytest.mark.parametrize("method", ["linear", "smoothquant"])
def test_keeping_everything_is_the_float_model(make_pipeline, inputs, tmp_path, method):
    """Only the fold remains, in fp32: 1e-5 is a hundred roundings of 6e-8 in a row."""
    pipe = make_pipeline()
    stats = calibrate(pipe, tmp_path, steps=2, samples=2, quiet=True)
    packed = convert(pipe, Recipe(method=method, keep=("*",)), stats, quiet=True)
    batch = inputs(pipe.transformer)
    with torch.no_grad():
        truth, other = pipe.transformer(**batch).sample, packed(**batch).sample
    assert (other - truth).abs().max() < 1e-5 * truth.abs().max()


@pytest.mark.parametrize(
    "keep",
    [("*.to_q",), ("*.to_v",), ("*.to_?",), ("*.ff.*",), ("*.to_out.0",), ("*.norm1.linear",)],
)
def test_keeping_some_layers_keeps_the_function(make_pipeline, inputs, tmp_path, keep):
    """Kept and quantized readers of a site share its factor, so the packed model stays close (W8A8 per token)."""
    pipe = make_pipeline()
    stats = calibrate(pipe, tmp_path, steps=2, samples=2, quiet=True)
    batch = inputs(pipe.transformer)
    with torch.no_grad():
        truth = pipe.transformer(**batch).sample
        noise = {
            patterns: float(
                (
                    convert(pipe, Recipe(keep=patterns), stats, quiet=True)(**batch).sample - truth
                ).norm()
            )
            for patterns in ((), keep)
        }
    # 8 bits leave an error of about 1 %; a factor folded on one side only would leave tens of percent
    assert noise[keep] < 0.05 * float(truth.norm())
    assert noise[keep] != noise[()]


def test_an_unknown_architecture_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"UNet2DModel has no family adapter; .*DiTTransformer2DModel"
    ):
        family_of("UNet2DModel")
