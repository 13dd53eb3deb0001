"""`ditq plan`, and `convert` and `inspect` with a plan: the same object for all three."""

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ditq_converters import read_plan
from ditq_converters.cli.convert import convert
from ditq_converters.cli.inspect import inspect
from ditq_converters.cli.plan import plan
from ditq_runtime.format.folder import open_folder

RULES = ("--set", "*.ff.net.2:weights=w4p,group_size=32", "--set", "*.0.attn1.to_q:weights=fp32")


@pytest.fixture(scope="module")
def ditq():
    app = typer.Typer()
    for command in (inspect, plan, convert):
        app.command()(command)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def planned(ditq, tmp_path_factory):
    """A plan file, and what the command said."""
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    result = ditq("plan", "demo:digits", "--method", "linear", *RULES, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_it_writes_a_plan_and_says_what_and_why(planned):
    out, said = planned
    made = read_plan(out)
    assert sum(entry.weights == "w4p" for entry in made.linears) == 6
    assert sum(entry.weights == "fp32" for entry in made.linears) == 1
    text = " ".join(said.replace("│", " ").split())
    assert "w4p in groups of 32" in text
    assert "by hand: weights=w4p" in text
    assert "24 sites, 56 linears; statistics needed: nothing" in text


def test_what_is_planned_is_shown_and_converted(ditq, planned, tmp_path):
    shown = json.loads(ditq("inspect", "demo:digits", "--plan", planned[0], "--json").stdout)
    same = ditq("inspect", "demo:digits", "--method", "linear", *RULES, "--json").stdout
    assert shown == json.loads(same)
    result = ditq("convert", "demo:digits", tmp_path / "out", "--plan", planned[0])
    assert result.exit_code == 0, result.output
    scheme = open_folder(tmp_path / "out").scheme
    formats = {layer["name"]: layer["format"] for layer in shown["layers"]}
    assert scheme.layers == {name: f for name, f in formats.items() if f != "float"}
    assert (tmp_path / "out" / "ditq" / "plan.json").read_text() == planned[0].read_text()


def test_a_plan_is_changed_by_rules_and_not_by_choices(ditq, planned, tmp_path):
    arguments = ("convert", "demo:digits", tmp_path / "out", "--plan", planned[0])
    mixed = ditq(*arguments, "--weights", "w8")
    assert mixed.exit_code == 2
    assert "weights was given too" in " ".join(mixed.stderr.replace("│", " ").split())
    changed = ditq(*arguments, "--set", "*.0.attn1.to_q:weights=w8")
    assert changed.exit_code == 0, changed.output
    layer = open_folder(tmp_path / "out").scheme.layers["transformer_blocks.0.attn1.to_q"]
    assert layer == "w8_token"


@pytest.mark.parametrize("rule", ["*.to_q", "nothing:weights=w8", "*.to_q:weights=w1"])
def test_rules_that_cannot_be_are_refused_before_the_work(ditq, tmp_path, rule):
    for command in (
        ("convert", "demo:digits", tmp_path / "out"),
        ("inspect", "demo:digits"),
        ("plan", "demo:digits", "--out", tmp_path / "plan.json"),
    ):
        result = ditq(*command, "--set", rule)
        assert result.exit_code == 1
        assert type(result.exception) is ValueError
    assert list(tmp_path.iterdir()) == []


def test_the_page_s_example_of_one_layer_by_hand_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "plan.md").read_text()
    (example,) = re.findall(r"```python\n(from ditq_converters import calibrate.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    exec(example.replace('out="stats")', 'out="stats", steps=2, samples=2, quiet=True)'), {})
    layers = open_folder(tmp_path / "out").scheme.layers
    assert layers["transformer_blocks.0.ff.net.2"] == "w8_token"
    assert layers["transformer_blocks.0.attn1.to_q"] == "w4p64_token"
    made = read_plan(tmp_path / "out" / "ditq" / "plan.json")
    assert {str(s.options) for s in made.sites if s.name.endswith(".fc1")} == {"{'alpha': 0.7}"}
