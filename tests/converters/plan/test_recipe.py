"""A recipe is validated once, with the choices in the sentence."""

import dataclasses
import json
import math

import pytest

from ditq_converters import Recipe
from ditq_runtime.format.attention import AttentionFormat


def test_groups_are_those_of_the_method_unless_told():
    """Alg. 1 of Meta's paper has groups of 128."""
    assert Recipe("meta", "w4g").group == 128
    assert Recipe("meta", "w4g", group_size=64).to_dict()["group_size"] == 64
    assert Recipe("ditas", "w4p").group == 64


def test_defaults():
    assert Recipe().to_dict() == {
        "method": "smoothquant",
        "weights": "w8",
        "activations": "token",
        "group_size": 64,
        "modulation": "w8",
        "modulation_activations": "none",
        "keep": [],
        "lora_rank": 0,
        "alpha": 0.5,
        "search": True,
        "ssc": True,
        "shift": True,
        "scale": True,
        "num_groups": None,
        "linkage": "ward",
        "ema": 0.99,
        "groups_per_layer": False,
        "range_method": "minmax",
        "weight_range_method": "minmax",
        "rounding": "nearest",
        "symmetric": False,
        "attention": "none",
        "attention_scales": None,
        "bias_correction": False,
        "iterations": 400,
        "kept_dtype": "fp32",
        "options": {},
    }


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"method": "awq"}, "method must be one of linear, smoothquant.*got 'awq'"),
        ({"weights": "w4"}, "weights must be one of w8, w4p, w4g, got 'w4'"),
        ({"weights": "fp32"}, "weights must be one of"),
        (
            {"activations": "tensor"},
            "activations must be one of token, token_asym, static, got 'te",
        ),
        ({"activations": "none"}, "activations must be one of"),
        ({"modulation": "fp32"}, "modulation must be one of w8, w4p, w4g, got 'fp32'"),
        ({"group_size": 0}, "group_size must be a positive multiple of 32, got 0"),
        ({"group_size": -64}, "group_size must be"),
        ({"group_size": 16}, "group_size must be"),
        ({"group_size": 48}, "group_size must be"),
        ({"rounding": "up"}, "rounding must be one of nearest, gptq"),
        ({"range_method": "mse"}, "range_method must be one of minmax, qdiff_mse, ptq4dit_pct"),
        ({"range_method": "qdiff_mse"}, "range_method qdiff_mse is for static activations"),
        ({"attention": "fp8"}, "attention must be one of none, int8, bf16, got 'fp8'"),
        ({"attention_scales": "head"}, "attention_scales must be one of token, static, got 'head'"),
        ({"alpha": -0.01}, "alpha must lie in"),
        ({"alpha": 1.01}, "alpha must lie in"),
        ({"alpha": math.nan}, "alpha must lie in"),
        ({"kept_dtype": "fp16"}, "kept_dtype must be one of fp32, bf16, got 'fp16'"),
        ({"options": {"strength": 1}}, "smoothquant has no option 'strength'; it has: alpha"),
    ],
)
def test_refusals(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"group_size": 32},
        {"group_size": 4608},
        {"modulation": "w4p"},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(fields):
    Recipe(**fields)


def test_one_keep_pattern_is_not_a_string_of_patterns():
    """Its characters would be the patterns, and `*` among them would keep every layer float, silently."""
    with pytest.raises(ValueError, match="keep"):
        Recipe(keep="*.to_q")


@pytest.mark.parametrize("method", ["linear", "smoothquant", "meta", "ditas", "ptq4dit", "htg"])
def test_attention_is_as_the_method_has_it_unless_told(method):
    """PTQ4DiT and HTG quantize both products at 8 bits, the others none; scales follow the activations."""
    default = Recipe(method, activations="static").attention_format
    published = AttentionFormat("int8", "static") if method in ("ptq4dit", "htg") else None
    assert default == published
    told = Recipe(method, activations="static", attention="bf16", attention_scales="token")
    assert told.attention_format == AttentionFormat("bf16", "token")
    assert Recipe(method, attention="none").attention_format is None


def test_modulation_follows_the_weights_unless_told():
    assert Recipe(weights="w4p").modulation_weights == "w4p"
    assert Recipe(weights="w4p", modulation="w8").modulation_weights == "w8"


def test_real_groups_are_symmetric_as_the_method_has_them_unless_told():
    assert Recipe("meta", "w4g").symmetric_weights
    assert not Recipe("ditas", "w4g").symmetric_weights
    assert not Recipe("meta", "w4g", symmetric=False).symmetric_weights
    assert Recipe("linear", "w4g", symmetric=True).to_dict()["symmetric"] is True
    with pytest.raises(ValueError, match="symmetric is a choice of w4g weights, got weights 'w4p'"):
        Recipe(weights="w4p", symmetric=True)


def test_keep_patterns_match_whole_names():
    recipe = Recipe(keep=("*.attn1.to_q", "blocks.0.*"))
    assert recipe.keeps("blocks.7.attn1.to_q")
    assert recipe.keeps("blocks.0.ff")
    assert not recipe.keeps("blocks.7.attn1.to_q.x")
    assert not recipe.keeps("blocks.10.ff")
    assert not Recipe().keeps("anything")


def test_a_recipe_is_frozen_and_json_safe():
    recipe = Recipe(keep=("a*", "b"))
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.alpha = 0.7
