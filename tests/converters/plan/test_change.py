"""Changing a plan by patterns: what is reached, what follows, and what is refused."""

import copy

import pytest

from ditq_converters.plan.change import parse_rule
from ditq_converters.plan.make import make_plan


@pytest.fixture
def plan(make_dit):
    return make_plan(make_dit(), weights="w4p", method="smoothquant")


def named(entries, end):
    return [entry for entry in entries if entry.name.endswith(end)]


def test_a_pattern_reaches_what_it_names_and_nothing_else(plan):
    before = copy.copy(plan)
    plan.set("transformer_blocks.*.ff.net.2", weights="w8")
    assert [e.weights for e in named(plan.linears, "ff.net.2")] == ["w8", "w8"]
    assert [e.group_size for e in named(plan.linears, "ff.net.2")] == [None, None]
    assert [e.reason for e in named(plan.linears, "ff.net.2")] == ["by hand: weights=w8"] * 2
    assert [e for e in plan.linears if not e.name.endswith("ff.net.2")] == [
        e for e in before.linears if not e.name.endswith("ff.net.2")
    ]
    assert (plan.sites, plan.attention) == (before.sites, before.attention)


def test_a_site_that_is_named_reaches_its_readers_and_a_reader_its_site(plan):
    plan.set("transformer_blocks.0.qkv", activations="static")
    static = [e.name.rpartition(".")[2] for e in plan.linears if e.activations == "static"]
    assert static == ["to_q", "to_k", "to_v"]
    plan.set("transformer_blocks.1.attn1.to_k", ranges="qdiff_mse", alpha=0.25)
    changed = [site for site in plan.sites if site.options]
    assert [site.name for site in changed] == ["transformer_blocks.1.qkv"]
    assert (changed[0].options, changed[0].ranges) == ({"alpha": 0.25}, "qdiff_mse")
    assert changed[0].reason == "by hand: ranges=qdiff_mse, alpha=0.25"


def test_fields_of_quantized_inputs_skip_what_has_none(plan):
    plan.set("*", rank=8)
    assert [e.rank for e in named(plan.linears, "norm1.linear")] == [0, 0]
    assert [e.rank for e in named(plan.linears, "proj_out_2")] == [0]
    assert [e.rank for e in named(plan.linears, "to_q")] == [8, 8]


def test_back_and_forth_between_formats(plan):
    plan.set("*.to_q", weights="fp32")
    (first, _) = named(plan.linears, "to_q")
    assert (first.weights, first.activations, first.group_size) == ("fp32", "none", None)
    plan.set("*.to_q", weights="w4g", group_size=32, symmetric=True)
    (first, _) = named(plan.linears, "to_q")
    assert (first.activations, first.group_size, first.symmetric) == ("token", 32, True)
    plan.set("*.to_q", weights="w4p")
    assert named(plan.linears, "to_q")[0].symmetric is False


def test_another_method_drops_the_options_of_the_one_before(plan):
    plan.set("*.qkv", alpha=0.25).set("*.qkv", method="htg", num_groups=2)
    assert {(s.method, str(s.options)) for s in named(plan.sites, ".qkv")} == {
        ("htg", "{'num_groups': 2}")
    }


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("a.*.b:weights=w8", ("a.*.b", {"weights": "w8"})),
        ("*:rank=8,rounding=gptq", ("*", {"rank": 8, "rounding": "gptq"})),
        ("*:symmetric=true,num_groups=null", ("*", {"symmetric": True, "num_groups": None})),
    ],
)
def test_rules_are_read(rule, expected):
    assert parse_rule(rule) == expected


@pytest.mark.parametrize("rule", ["", "a", "a:", ":weights=w8", "a:weights", "a:=w8", "a:b=c,d"])
def test_rules_that_are_none_are_refused(rule):
    with pytest.raises(ValueError, match="--set must read PATTERN:field=value"):
        parse_rule(rule)


@pytest.mark.parametrize(
    ("pattern", "values", "sentence"),
    [
        ("nothing", {"weights": "w8"}, "'nothing' matches no site, linear or attention"),
        ("proj_out_2", {"weights": "w8"}, "nothing that 'proj_out_2' matches can be given weights"),
        ("*", {"width": 3}, "can be given width; linears have weights, activations"),
        ("*.to_q", {"weights": "w3"}, r"0\.attn1\.to_q: weights must be one of w8.*got 'w3'"),
        ("*.qkv", {"method": "awq"}, r"0\.qkv: method must be one of linear.*got 'awq'"),
        ("*.qkv", {"alpha": 2.0}, r"0\.qkv: option alpha must lie in \[0, 1\], got 2"),
        ("*.qkv", {"method": "meta", "alpha": 0.1}, "can be given alpha"),
        ("*.to_q", {"rank": -1}, "rank must be a count, 0 for none, got -1"),
        ("*.to_q", {"group_size": 24}, r"to_q: resolve_group_size: no multiple of 32"),
        ("*.to_q", {"name": "x"}, "can be given name"),
    ],
)
def test_refusals_name_the_entry(plan, pattern, values, sentence):
    before = copy.copy(plan)
    with pytest.raises(ValueError, match=sentence):
        plan.set(pattern, **values)
    assert plan == before
