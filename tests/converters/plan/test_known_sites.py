"""Sites of classes whose inputs cannot be made from their configuration: out of the statistics, or by --inputs."""

import json

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from ditq_bench.zoo import CLASSES, outputs, quiet
from ditq_converters import StatisticsError, calibrate, convert, make_plan, read_plan
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.cli.convert import convert as convert_command
from ditq_converters.cli.inspect import inspect
from ditq_converters.cli.plan import plan as plan_command
from ditq_converters.plan.recipe import Recipe
from ditq_converters.sites import find

TINY = CLASSES["LatteTransformer3DModel"]
SMOOTH = Recipe(method="smoothquant")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A folder with the model, one with its statistics, and the inputs of a forward."""
    place = tmp_path_factory.mktemp("known")
    model = TINY.build()
    inputs = TINY.inputs(model)
    with quiet():
        calibrate(model, place / "stats", run=lambda m: m(**inputs), attention=False, quiet=True)
        model.save_pretrained(place / "model")
    return place, inputs


@pytest.fixture
def untraced(monkeypatch):
    """Nobody may trace."""

    def refuse(*_):
        raise AssertionError("a forward was traced")

    monkeypatch.setattr(find, "discover", refuse)


@pytest.fixture
def ditq():
    app = typer.Typer()
    for command in (inspect, plan_command, convert_command):
        app.command(command.__name__)(command)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


def test_statistics_carry_the_sites_to_whoever_plans_and_converts(case, untraced, tmp_path):
    place, inputs = case
    model = TINY.build()  # another object: nothing is remembered of it
    stats = CalibrationStats.open(place / "stats")
    plan = make_plan(place / "model", stats, method="smoothquant")
    assert any(len(site.readers) > 1 for site in plan.sites)
    assert {site.place for site in plan.sites} >= {"value", "quantizer"}
    with quiet():
        packed = convert(model, SMOOTH, stats, tmp_path / "out", quiet=True)
        truth, got = outputs(model, inputs)[0], outputs(packed, inputs)[0]
    assert 0 < float((got - truth).norm() / truth.norm()) < 0.05
    sites = packed.config.quantization_config.scheme.sites
    assert {name: set(site.readers) for name, site in sites.items()} == {
        site.name: set(site.readers) for site in plan.sites
    }


def test_the_command_needs_no_inputs_with_statistics(case, untraced, ditq, tmp_path):
    place, _ = case
    out = tmp_path / "plan.json"
    result = ditq("plan", place / "model", "--stats", place / "stats", "--out", out)
    assert result.exit_code == 0, result.output
    assert any(len(site.readers) > 1 for site in read_plan(out).sites)
    with quiet():
        result = ditq("convert", place / "model", tmp_path / "o", "--stats", place / "stats")
    assert result.exit_code == 0, result.output


def test_sites_of_another_model_are_refused(case):
    stats = CalibrationStats.open(case[0] / "stats")
    deeper = type(TINY.build())(**{**TINY.config, "num_layers": 1})
    with pytest.raises(StatisticsError, match="has other linears; calibrate this model"):
        make_plan(deeper, stats)


def test_a_file_of_arguments_stands_for_inputs_that_cannot_be_made(ditq, tmp_path):
    tiny = TINY
    model = tiny.build()
    with quiet():
        model.save_pretrained(tmp_path / "model")
    given = {name: x for name, x in tiny.inputs(model).items() if isinstance(x, torch.Tensor)}
    save_file(given, tmp_path / "arguments.safetensors")
    needs = ditq("plan", tmp_path / "model", "--out", tmp_path / "p.json")
    assert "inputs (--inputs FILE)" in str(needs.exception)
    options = ("--inputs", tmp_path / "arguments.safetensors")
    result = ditq("plan", tmp_path / "model", "--out", tmp_path / "p.json", *options)
    assert result.exit_code == 0, result.output
    assert any(len(site.readers) > 1 for site in read_plan(tmp_path / "p.json").sites)
    result = ditq("inspect", tmp_path / "model", "--json", *options)
    assert {layer["kind"] for layer in json.loads(result.stdout)["layers"]} >= {"V"}


def test_the_first_call_of_a_pipeline_tells_its_sites(ditq, tmp_path):
    with quiet():
        TINY.pipeline().save_pretrained(tmp_path / "pipe")
    calls, out = tmp_path / "calls.jsonl", tmp_path / "plan.json"
    calls.write_text(json.dumps(TINY.calls[0]))
    with quiet():
        result = ditq("plan", tmp_path / "pipe", "--inputs", calls, "--out", out)
    assert result.exit_code == 0, result.output
    assert any(len(site.readers) > 1 for site in read_plan(out).sites)
