"""A plan against a model: the sentence names the entry. What is legal converts, one layer by hand included."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ditq_converters import StatisticsError, calibrate, convert
from ditq_converters.plan.check import check_plan, check_statistics
from ditq_converters.plan.make import make_plan
from ditq_runtime.families import family_of

BLOCK = "transformer_blocks.0"


def check(plan, model):
    check_plan(plan, model, family_of(type(model).__name__))


def with_linear(plan, name, **values):
    changed = [replace(e, **values) if e.name == name else e for e in plan.linears]
    return replace(plan, linears=tuple(changed))


def with_site(plan, name, **values):
    changed = [replace(s, **values) if s.name == name else s for s in plan.sites]
    return replace(plan, sites=tuple(changed))


def test_a_plan_is_for_one_model(make_dit):
    plan = make_plan(make_dit())
    check(plan, make_dit(seed=1))
    for other, sentence in (
        (make_dit(num_layers=1), r"transformer_blocks\.1\.qkv: the model has no such site"),
        (make_dit(num_layers=3), r"transformer_blocks\.2\.fc1: this site of the model is missing"),
        (make_dit(num_attention_heads=2), r"to_q: its shape is \(32, 32\) in the model"),
    ):
        with pytest.raises(ValueError, match=sentence):
            check(plan, other)
    with pytest.raises(ValueError, match="is for a FluxTransformer2DModel, this model is a DiT"):
        check(replace(plan, architecture="FluxTransformer2DModel"), make_dit())


CASES = [
    (with_linear, f"{BLOCK}.attn1.to_q", {"activations": "static"}, r"qkv: its readers share one"),
    (with_linear, "proj_out_1", {"activations": "token"}, "stands in no block"),
    (with_linear, f"{BLOCK}.norm1.linear", {"rounding": "aimed"}, "for linears that read a site"),
    (with_linear, f"{BLOCK}.ff.net.2", {"weights": "w4p", "group_size": 48}, "does not divide its"),
    (with_linear, f"{BLOCK}.ff.net.2", {"weights": "as it is", "activations": "none"}, "take fp32"),
    (with_linear, "proj_out_2", {"weights": "w8"}, "outside the blocks and only for them"),
    (with_linear, f"{BLOCK}.ff.net.2", {"site": f"{BLOCK}.fc1"}, "its site is transformer_bl"),
    (
        with_linear,
        f"{BLOCK}.ff.net.2",
        {"activations": "none", "rounding": "gptq"},
        "rounding by rows and bias correction need quantized activations",
    ),
    (with_site, f"{BLOCK}.fc2", {"place": "adaln"}, r"place must be one of quantizer, got 'adaln'"),
    (with_site, f"{BLOCK}.o_proj", {"shifts": "groups"}, "shifts can be constant at most where"),
    (with_site, f"{BLOCK}.qkv", {"ranges": "qdiff_mse"}, "qdiff_mse is for static activations"),
    (with_site, f"{BLOCK}.qkv", {"readers": ("a",)}, "its readers are .*to_v, got a"),
    (with_site, f"{BLOCK}.qkv", {"options": {"num_groups": 3}}, "one set of timestep groups"),
]


@pytest.mark.parametrize(("change", "name", "values", "sentence"), CASES)
def test_what_does_not_go_together_is_refused(make_dit, change, name, values, sentence):
    plan = change(make_plan(make_dit(), method="htg"), name, **values)
    with pytest.raises(ValueError, match=sentence):
        check(plan, make_dit())


def test_attention_that_cannot_run_quantized(make_dit):
    plan = make_plan(make_dit()).set("*.0.attn1", values="int8")
    with pytest.raises(ValueError, match=r"0\.attn1: its head dimension is 16.*values none"):
        check(plan, make_dit())


def test_statistics_must_hold_what_is_needed(make_dit):
    model = make_dit(num_attention_heads=2, attention_head_dim=32)
    none = SimpleNamespace(
        folder="stats", manifest={}, has_attention=False, has_rows=False, timesteps=[500.0, 0.0]
    )
    check_statistics(make_plan(model), none)
    for choices, sentence in (
        ({"rounding": "gptq"}, "no sampled rows; calibrate into a new folder with --rows 64"),
        ({"attention": "int8", "attention_scales": "static"}, "no ranges of Q, K and V"),
    ):
        with pytest.raises(StatisticsError, match=sentence):
            make_plan(model, none, **choices)
        with pytest.raises(
            ValueError, match=r"transformer_blocks\.0\.qkv: method smoothquant needs"
        ):
            check_statistics(make_plan(model, **choices), None)


def test_layers_set_by_hand_are_what_is_converted(make_dit, inputs, tmp_path):
    """Three formats in one block, two methods, a kept reader, a transform left to the quantizer."""
    model = make_dit()
    stats = calibrate(model, tmp_path / "stats", steps=2, samples=2, rows=4, quiet=True)
    plan = make_plan(
        model,
        stats,
        weights="w4p",
        set=[
            "*.0.ff.net.2:weights=w8,rank=2",
            "*.1.attn1.to_k:weights=fp32",
            "*.1.fc2:method=linear,activations=static",
            "*.0.qkv:alpha=0.7",
            "*.1.o_proj:place=quantizer",
            "*.0.norm1.linear:weights=w8",
        ],
    )
    packed = convert(model, plan, stats, tmp_path / "out", quiet=True)
    scheme = packed.config.quantization_config.scheme
    assert scheme.layers["transformer_blocks.0.ff.net.2"] == "w8_token_lora2"
    assert scheme.layers["transformer_blocks.0.attn1.to_q"] == "w4p64_token"
    assert scheme.layers["transformer_blocks.1.attn1.to_k"] == "fp32"
    assert scheme.layers["transformer_blocks.1.ff.net.2"] == "w4p64_static"
    assert scheme.layers["transformer_blocks.1.attn1.to_out.0"] == "w4p64_token"
    assert scheme.sites["transformer_blocks.1.o_proj"].place == "quantizer"
    assert scheme.sites["transformer_blocks.1.o_proj"].smooth
    assert not scheme.sites["transformer_blocks.1.fc2"].smooth
    assert scheme.layers["transformer_blocks.0.norm1.linear"] == "w8_weight_only"
    with torch.no_grad():
        truth, ours = model(**inputs(model)).sample, packed(**inputs(model)).sample
    assert 0 < float((ours - truth).norm() / truth.norm()) < 0.3  # a wrong fold is of order 1
