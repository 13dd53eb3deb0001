"""Choices to a plan: every site and linear once, with what happens to it and why."""

import pytest
import torch
from torch import nn

from ditq_bench.zoo import CLASSES
from ditq_converters import Recipe, calibrate, convert
from ditq_converters.plan.make import make_plan
from ditq_runtime.families import family_of

CONSUMERS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
)


def linears(model, **choices):
    return {entry.name: entry for entry in make_plan(model, **choices).linears}


def sites(model, block="transformer_blocks.0", **choices):
    found = make_plan(model, **choices).part(block).sites
    return {name: (site.method, site.place, site.shifts) for name, site in found.items()}


def test_every_linear_appears_once(make_dit):
    model = make_dit(num_layers=3)
    names = [entry.name for entry in make_plan(model).linears]
    there = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(names) == len(set(names))
    assert sorted(names) == sorted(there)
    # per block 6 consumers, 1 modulation, 2 of the timestep embedder; final modulation and projection
    assert len(names) == 3 * 9 + 2


def test_block_order_is_numeric(make_dit):
    plan = make_plan(make_dit(num_layers=11))
    blocks = dict.fromkeys(site.name.rpartition(".")[0] for site in plan.sites)
    assert list(blocks) == [f"transformer_blocks.{i}" for i in range(11)]


@pytest.mark.parametrize("weights", ["w8", "w4p"])
@pytest.mark.parametrize("activations", ["token", "static"])
def test_formats(make_dit, weights, activations):
    entries = linears(make_dit(), weights=weights, activations=activations)
    group = 64 if weights == "w4p" else None
    for name in CONSUMERS:
        entry = entries[f"transformer_blocks.1.{name}"]
        assert (entry.weights, entry.activations, entry.group_size) == (weights, activations, group)
    modulation = entries["transformer_blocks.1.norm1.linear"]
    assert (modulation.weights, modulation.activations) == (weights, "none")
    final = entries["proj_out_1"]  # no block follows to drown its error
    assert (final.weights, final.activations) == ("w8", "none")
    kept = linears(make_dit(), weights=weights, keep=("proj_out_1",))["proj_out_1"]
    assert kept.weights == "fp32"


@pytest.mark.parametrize(
    ("method", "fc2"),
    [
        ("smoothquant", ("smoothquant", "quantizer", "none")),
        ("htg", ("linear", "quantizer", "none")),  # the paper leaves it alone
        ("meta", ("meta", "quantizer", "none")),
    ],
)
def test_where_transforms_go(make_dit, method, fc2):
    assert sites(make_dit(), method=method) == {
        "qkv": (method, "adaln", "groups"),
        "o_proj": (method, "value", "constant"),
        "fc1": (method, "adaln", "groups"),
        "fc2": fc2,
    }


def test_every_entry_has_a_reason(make_dit):
    plan = make_plan(make_dit(), method="htg", keep=("*.0.attn1.to_q",))
    reasons = {entry.name: entry.reason for entry in (*plan.sites, *plan.linears, *plan.attention)}
    assert all(reasons.values())
    block = "transformer_blocks.0"
    assert "norm1.linear" in reasons[f"{block}.qkv"]
    assert "attn1.to_v" in reasons[f"{block}.o_proj"]
    assert "GELU" in reasons[f"{block}.fc2"]
    assert "kept float" in reasons[f"{block}.attn1.to_q"]
    assert "head dimension is 16" in reasons[f"{block}.attn1"]
    outside = [entry for entry in plan.linears if entry.site == "outside"]
    assert len(outside) == 2 * 2 + 1
    assert all(entry.weights == "as it is" and "float" in entry.reason for entry in outside)


def test_modulation_has_its_own_weights(make_dit):
    entries = linears(make_dit(), weights="w4p", modulation="w8")
    assert entries["transformer_blocks.0.norm1.linear"].weights == "w8"
    assert entries["transformer_blocks.0.attn1.to_q"].weights == "w4p"


def test_kept_layers_stay_float(make_dit):
    for name, entry in linears(
        make_dit(), weights="w4p", keep=("*.1.ff.*", "*.norm1.linear")
    ).items():
        if entry.weights == "as it is":
            continue
        kept = ".1.ff." in name or name.endswith("norm1.linear")
        assert (entry.weights == "fp32") == kept
        if kept:
            assert (entry.activations, entry.group_size) == ("none", None)


def test_a_site_is_transformed_while_one_reader_is_quantized(make_dit):
    some = sites(make_dit(), keep=("*.to_q", "*.ff.net.2"))
    assert (some["qkv"][0], some["fc2"][0]) == ("smoothquant", "linear")
    none = {"keep": ("*.0.attn1.to_?",)}
    assert sites(make_dit(), **none)["qkv"][0] == "linear"
    assert sites(make_dit(), "transformer_blocks.1", **none)["qkv"][0] == "smoothquant"


@pytest.mark.parametrize("pattern", ["nothing.*", "proj_out_2", "to_q", "*.norm1.emb.*"])
def test_a_keep_pattern_that_matches_nothing_is_refused(make_dit, pattern):
    """Embedders and the final projection are float already: a pattern for them would be a misunderstanding."""
    with pytest.raises(
        ValueError, match=r"matches none of the 15 quantized modules; see `ditq inspect`"
    ):
        make_plan(make_dit(), keep=("*.to_q", pattern))


@pytest.mark.parametrize(
    ("requested", "narrow", "wide"), [(32, 32, 32), (64, 32, 64), (128, 96, 128), (512, 96, 384)]
)
def test_group_sizes_fall_back_to_a_divisor(make_dit, requested, narrow, wide):
    """96 inputs and 384: the largest multiple of 32 that divides and is at most what was asked."""
    model = make_dit(num_attention_heads=6)  # 6 x 16 = 96
    entries = linears(model, weights="w4p", group_size=requested)
    assert entries["transformer_blocks.0.attn1.to_q"].group_size == narrow
    assert entries["transformer_blocks.0.ff.net.2"].group_size == wide
    assert entries["transformer_blocks.0.norm1.linear"].group_size == narrow


def test_where_no_group_divides_real_groups_take_a_scale_per_channel(make_dit):
    """48 inputs: one group of all, and the format says so; 192 inputs still have groups."""
    entries = linears(make_dit(num_attention_heads=3), weights="w4g", group_size=128)
    assert entries["transformer_blocks.0.attn1.to_q"].group_size == 48
    assert entries["transformer_blocks.0.norm1.linear"].group_size == 48
    assert entries["transformer_blocks.0.ff.net.2"].group_size == 96


def test_a_width_that_no_group_divides_takes_eight_bits_and_says_so(make_dit):
    entries = linears(make_dit(num_attention_heads=3), weights="w4p")  # 48 inputs, 192 behind GELU
    for name in ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "norm1.linear"):
        entry = entries[f"transformer_blocks.0.{name}"]
        assert (entry.weights, entry.group_size) == ("w8", None)
        assert "w8 instead of w4p: no group of a multiple of 32 divides 48" in entry.reason
    assert entries["transformer_blocks.0.ff.net.2"].weights == "w4p"


@pytest.mark.parametrize(
    ("choices", "needs"),
    [
        ({"method": "linear"}, (False, False, False)),
        ({"method": "linear", "activations": "static"}, (True, False, False)),
        ({"method": "smoothquant"}, (True, False, False)),
        ({"method": "ditas"}, (True, True, False)),
        ({"method": "ditas", "search": False}, (True, False, False)),
        ({"method": "linear", "rounding": "gptq"}, (True, True, False)),
        ({"method": "linear", "bias_correction": True}, (True, True, False)),
        (
            {"method": "linear", "activations": "static", "range_method": "qdiff_mse"},
            (True, True, False),
        ),
        ({"method": "linear", "attention": "int8"}, (False, False, False)),
        (
            {"method": "linear", "attention": "int8", "attention_scales": "static"},
            (True, False, True),
        ),
        ({"method": "linear", "attention_scales": "static"}, (False, False, False)),
    ],
)
def test_what_a_plan_needs(make_dit, choices, needs):
    plan = make_plan(make_dit(num_attention_heads=2, attention_head_dim=32), **choices)
    assert (plan.needs_statistics, plan.needs_rows, plan.needs_operands) == needs


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


@pytest.mark.parametrize(
    ("build", "left_alone"),
    [
        ("DiTTransformer2DModel", {"fc2"}),
        ("PixArtTransformer2DModel", {"xattn_q", "xattn_kv", "fc2"}),
        ("SD3Transformer2DModel", {"fc2", "fc2_context"}),
        ("FluxTransformer2DModel", {"fc2", "fc2_context"}),
    ],
)
def test_where_a_table_says_so_shifts_fold_and_no_quantizer_subtracts(build, left_alone):
    """HTG on the families with a direct multiplier: AdaLN takes a shift per group, V one for all, and nothing else."""
    tiny = CLASSES[build]
    plan = make_plan(tiny.build(), method="htg", attention="none")
    shifted = {(site.place, site.shifts) for site in plan.sites if site.method == "htg"}
    assert shifted == {("adaln", "groups"), ("value", "constant")}
    alone = [site for site in plan.sites if site.method == "linear"]
    assert {site.name.rpartition(".")[2] for site in alone} == left_alone
    assert {(site.place, site.shifts) for site in alone} == {("quantizer", "none")}
