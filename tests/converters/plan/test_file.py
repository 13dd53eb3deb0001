"""The plan's file: a round trip, one entry a line, and a sentence that names what is wrong."""

import json

import pytest

from ditq_converters.plan.compact import compact, headline
from ditq_converters.plan.file import from_json, read_plan, to_json, write_plan
from ditq_converters.plan.make import make_plan


@pytest.fixture(scope="module")
def plan(make_dit):
    choices = {"method": "htg", "weights": "w4g", "activations": "static", "num_groups": 2}
    model = make_dit(num_attention_heads=2, attention_head_dim=32)
    return make_plan(model, **choices, kept_dtype="bf16", keep=("*.to_q",))


def test_it_survives_the_disk(plan, tmp_path):
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert to_json(read_plan(tmp_path / "plan.json")) == (tmp_path / "plan.json").read_text()


def test_a_change_of_one_entry_changes_one_line(plan):
    text = to_json(plan)
    other = from_json(text).set("transformer_blocks.1.ff.net.2", rank=4)
    lines = zip(text.splitlines(), to_json(other).splitlines(), strict=True)
    (changed,) = [(a, b) for a, b in lines if a != b]
    assert all(line.lstrip().startswith('"transformer_blocks.1.ff.net.2"') for line in changed)


def test_entries_stand_in_the_order_of_the_model(plan):
    stored = json.loads(to_json(plan))
    assert list(stored) == [
        "plan_version", "architecture", "kept_dtype", "sites", "linears", "attention",
    ]  # fmt: skip
    assert list(stored["sites"])[:4] == [
        f"transformer_blocks.0.{name}" for name in ("qkv", "o_proj", "fc1", "fc2")
    ]


def broken(text, change):
    stored = json.loads(text)
    change(stored)
    return json.dumps(stored)


Q = "transformer_blocks.0.attn1.to_q"
CASES = [
    (lambda s: s.update(plan_version=9), "plan_version 9, this ditq reads 1"),
    (lambda s: s.pop("sites"), "lacks the field 'sites'"),
    (lambda s: s.update(more=1), "unknown field 'more'"),
    (lambda s: s.update(kept_dtype="fp8"), "kept_dtype must be one of fp32, bf16, got 'fp8'"),
    (lambda s: s.update(linears=[]), "linears must be an object"),
    (
        lambda s: s["linears"][Q].update(bits=4),
        rf"{Q}: unknown field 'bits'; there are shape, site",
    ),
    (lambda s: s["linears"][Q].pop("weights"), rf"{Q}: lacks the field 'weights'"),
    (lambda s: s["linears"][Q].update(weights="w2"), rf"{Q}: weights must be one of .*got 'w2'"),
    (lambda s: s["linears"][Q].update(rank="4"), rf"{Q}: rank has the wrong type: '4'"),
    (lambda s: s["linears"][Q].update(rank=True), rf"{Q}: rank has the wrong type: True"),
    (lambda s: s["linears"][Q].update(shape=[64]), rf"{Q}: shape has the wrong type"),
    (lambda s: s["linears"][Q].update(group_size=32), rf"{Q}: group_size belongs to w4p and w4g"),
    (lambda s: s["linears"][Q].update(activations="token"), rf"{Q}: activations is for quantized"),
    (lambda s: s["sites"]["transformer_blocks.0.qkv"].update(readers="x"), "readers has the wrong"),
    (
        lambda s: s["sites"]["transformer_blocks.0.qkv"].update(options={"alpha": 1}),
        r"transformer_blocks\.0\.qkv: method htg has no option 'alpha'; it has: shift, scale",
    ),
    (lambda s: s["attention"].update(x={"values": "fp8"}), "x: values must be one of none, int8"),
]


@pytest.mark.parametrize(("change", "sentence"), CASES)
def test_what_is_wrong_is_named(plan, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_json(broken(to_json(plan), change))


def test_files_that_are_none(plan, tmp_path):
    with pytest.raises(ValueError, match="no such plan; make it with `ditq plan"):
        read_plan(tmp_path / "plan.json")
    for text in (to_json(plan)[:-3], "[" * 100_000):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=r"plan\.json: plan: not valid JSON"):
            read_plan(tmp_path / "plan.json")
    twice = to_json(plan).replace('"sites"', '"sites": {}, "sites"')
    with pytest.raises(ValueError, match="sites is there twice"):
        from_json(twice)


def test_in_short_all_blocks_are_one(plan):
    short = compact(plan)
    assert short["sites"]["transformer_blocks.*.qkv"] == {
        "place": "adaln", "method": "htg", "options": {"num_groups": 2},
    }  # fmt: skip
    assert short["linears"]["transformer_blocks.*.attn1.to_q"] == {"weights": "fp32"}
    assert short["linears"]["proj_out_1"] == {"weights": "w8"}
    assert short["attention"] == {
        "transformer_blocks.*.attn1": {"values": "int8", "scales": "static"}
    }
    assert headline(plan) == {"method": "htg", "weights": "w4g", "activations": "static"}
    other = from_json(to_json(plan)).set("transformer_blocks.1.ff.net.2", weights="w8")
    apart = compact(other)["linears"]
    assert "transformer_blocks.*.ff.net.2" not in apart
    assert apart["transformer_blocks.1.ff.net.2"]["weights"] == "w8"
    assert headline(other)["weights"] == "w4g, w8"
