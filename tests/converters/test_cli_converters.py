"""The commands as a user types them: exit codes, JSON, and sentences for misuse."""

import json

import pytest
import torch
import typer
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from ditq_converters.cli.calibrate import calibrate
from ditq_converters.cli.choices import UNFED
from ditq_converters.cli.convert import convert
from ditq_converters.cli.demo import demo
from ditq_converters.cli.inspect import inspect
from ditq_converters.cli.plan import plan
from ditq_runtime import QuantLinear
from ditq_runtime.format.folder import open_folder


@pytest.fixture(scope="module")
def ditq():
    """Run a command line; commands only, without the script's error handling."""
    app = typer.Typer()
    for command in (inspect, calibrate, plan, convert, demo):
        app.command()(command)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


SMALL = ("--steps", 2, "--samples", 2)


@pytest.fixture(scope="module")
def stats(ditq, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stats") / "stats"
    result = ditq("calibrate", "demo:digits", "--out", folder, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_calibrate_writes_statistics_and_says_so(stats, ditq):
    folder, report = stats
    assert report["inputs"] == 1
    assert report["timesteps"] == {"transformer": [500.0, 0.0]}
    assert report["out"] == str(folder)
    assert report["bytes"] == sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file()
    )
    again = ditq("calibrate", "demo:digits", "--out", folder, *SMALL)
    assert again.exit_code == 0
    assert "2 timesteps of transformer from 1 inputs" in " ".join(again.stdout.split())


def test_calibrate_refuses_another_plan_in_the_same_folder(stats, ditq):
    result = ditq("calibrate", "demo:digits", "--out", stats[0], "--steps", 3, "--samples", 2)
    assert result.exit_code == 1
    assert "other inputs" in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate", "demo:digits"),  # no --out
        ("calibrate", "demo:digits", "--out", "x", "--sampler", "heun"),
        ("calibrate", "demo:digits", "--out", "x", "--steps", "0"),
        ("calibrate", "demo:digits", "--out", "x", "--samples", "many"),
        ("calibrate", "demo:digits", "--out", "x", "--seed", "-1"),
        ("convert", "demo:digits"),  # no OUT
        ("convert", "demo:digits", "x", "--method", "awq"),
        ("convert", "demo:digits", "x", "--weights", "w3"),
        ("convert", "demo:digits", "x", "--activations", "row"),
        ("convert", "demo:digits", "x", "--group-size", "33"),
        ("convert", "demo:digits", "x", "--alpha", "2"),
        ("convert", "demo:digits", "x", "--rounding", "up"),
        ("convert", "demo:digits", "x", "--range-method", "qdiff_mse"),  # per token
        ("convert", "demo:digits", "x", "--modulation", "w3"),
        ("convert", "demo:digits", "x", "--weights", "w4p", "--symmetric"),
        ("inspect",),
        ("inspect", "demo:digits", "--weights", "w3"),
        ("nonsense",),
    ],
)
def test_misuse_exits_with_2_and_touches_nothing(ditq, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = ditq(*arguments)
    assert result.exit_code == 2, result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (("calibrate", "demo:digits", "--out", "x", "--sampler", "heun"), "ddim, ddpm"),
        (("convert", "demo:digits", "x", "--method", "awq"), "linear, smoothquant"),
        (("inspect", "demo:digits", "--weights", "w3"), "w8, w4p"),
    ],
)
def test_misuse_names_the_choices(ditq, tmp_path, monkeypatch, arguments, choices):
    monkeypatch.chdir(tmp_path)
    # rich draws a box and breaks lines at its width
    text = " ".join(ditq(*arguments).stderr.replace("│", " ").split())
    assert choices in text


def test_convert_with_given_statistics(ditq, stats, tmp_path):
    out = tmp_path / "out"
    result = ditq("convert", "demo:digits", out, "--weights", "w4p", "--stats", stats[0], "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    (file,) = (out / "transformer").glob("*.safetensors")
    assert report["bytes"] == file.stat().st_size == sum(report["bytes_by_category"].values())
    assert report["out"] == str(out)
    assert report["seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_convert_corrects_biases_where_asked(ditq, stats, tmp_path):
    out = tmp_path / "out"
    result = ditq(
        "convert",
        "demo:digits",
        out,
        "--method",
        "linear",
        "--bias-correction",
        "--stats",
        stats[0],
    )
    assert result.exit_code == 0, result.output
    config = json.loads((out / "transformer" / "config.json").read_text())
    plan = config["quantization_config"]["recipe"]["plan"]
    assert plan["linears"]["transformer_blocks.*.ff.net.2"]["bias_correction"] is True


def test_convert_calibrates_where_it_must_and_keeps_the_statistics(ditq, tmp_path):
    out = tmp_path / "out"
    result = ditq("convert", "demo:digits", out, "--activations", "static", *SMALL)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.stats"]
    assert "transformer on disk" in result.stdout
    assert "ditq sample" in result.stdout
    assert DiffusionPipeline.from_pretrained(out).get_label_ids(["nine"]) == [9]


def test_convert_without_statistics_where_none_are_needed(ditq, tmp_path):
    result = ditq("convert", "demo:digits", tmp_path / "out", "--method", "linear")
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    told = [line for line in result.output.splitlines() if "of its weights stay float" in line]
    assert told
    assert "pos_embed" in told[0] or "label" in told[0] or "emb" in told[0]
    assert "ditq/plan.json says why" in told[0]


@pytest.mark.parametrize(("choice", "least"), [("--symmetric", 1), ("--asymmetric", 0)])
def test_real_groups_with_and_without_zero_points(ditq, tmp_path, choice, least):
    arguments = ("--method", "linear", "--weights", "w4g", "--group-size", 32, choice)
    result = ditq("convert", "demo:digits", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "out" / "transformer").glob("*.safetensors")
    stored = load_file(file)
    names = [name for name in stored if name.endswith("weight_zero")]
    assert all(bool((stored[name] == 8).all()) == (choice == "--symmetric") for name in names)
    high = torch.cat([stored[name.replace("_zero", "")].flatten() >> 4 for name in names])
    assert (int(high.min()), int(high.max())) == (least, 15)


def test_keep_is_repeatable(ditq, tmp_path):
    arguments = ("--method", "linear", "--keep", "*.to_q", "--keep", "*.ff.net.2")
    result = ditq("convert", "demo:digits", tmp_path / "out", *arguments, "--modulation", "w4p")
    assert result.exit_code == 0, result.output
    model = DiffusionPipeline.from_pretrained(tmp_path / "out").transformer
    weights = {
        name.partition(".")[2].partition(".")[2] or name: layer.format.weights
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLinear)
    }
    assert weights == {
        "attn1.to_q": "fp32",
        "attn1.to_k": "w8",
        "attn1.to_v": "w8",
        "attn1.to_out.0": "w8",
        "ff.net.0.proj": "w8",
        "ff.net.2": "fp32",
        "norm1.linear": "w4p",
        "proj_out_1": "w8",
    }


def test_a_keep_that_matches_nothing_is_refused_before_the_work(ditq, tmp_path):
    for command in (("convert", "demo:digits", tmp_path / "out"), ("inspect", "demo:digits")):
        result = ditq(*command, "--keep", "typo.*")
        assert result.exit_code == 1
        assert "--keep 'typo.*' matches none" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_more_timestep_groups_than_calls_are_refused_before_the_calibration(ditq, tmp_path):
    choices = ("--method", "htg", "--groups", 4, "--steps", 3, "--samples", 1)
    result = ditq("convert", "demo:digits", tmp_path / "out", *choices)
    assert result.exit_code == 1
    assert "4 timestep groups, but the calibration makes 3 calls" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_use_is_refused(ditq, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = ditq("convert", "demo:digits", tmp_path / "out", "--method", "linear")
    assert result.exit_code == 1
    assert "already exists" in str(result.exception)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("model", ["demo:letters", "./nowhere", "model.pt"])
def test_an_unknown_model_is_one_sentence(ditq, tmp_path, model):
    for command in ((), (tmp_path / "out",)):
        result = ditq("convert" if command else "inspect", model, *command)
        assert result.exit_code == 1
        assert type(result.exception) is ValueError
        assert "\n" not in str(result.exception)


def test_inspect_a_float_model(ditq):
    result = ditq("inspect", "demo:digits", "--weights", "w4p", "--keep", "*.to_q", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["architecture"] == "DiTTransformer2DModel"
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert len(layers) == 6 * 9 + 2
    assert layers["transformer_blocks.0.attn1.to_q"]["format"] == "fp32"
    assert layers["transformer_blocks.0.attn1.to_k"]["format"] == "w4p64_token_asym"
    assert layers["transformer_blocks.0.ff.net.2"]["format"] == "w4p64_token_asym"
    assert layers["proj_out_2"]["format"] == "float"
    quantized = [e for e in layers.values() if e["format"] not in ("float", "fp32")]
    share = sum(e["parameters"] for e in quantized) / report["parameters"]
    assert report["quantized_parameters_share"] == pytest.approx(share)


def test_inspect_prints_a_table(ditq):
    result = ditq("inspect", "demo:digits")
    assert result.exit_code == 0
    assert "fold plan of DiTTransformer2DModel" in result.stdout
    assert "parameters become integers" in result.stdout


def test_inspect_a_packed_model(ditq, stats, tmp_path):
    out = tmp_path / "out"
    ditq(
        "convert",
        "demo:digits",
        out,
        "--method",
        "smoothquant",
        "--weights",
        "w4p",
        "--stats",
        stats[0],
    )
    for path in (out, out / "transformer"):
        result = ditq("inspect", path, "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["recipe"]["method"] == "smoothquant"
        assert report["shared_embedder"] is True
        assert sum(report["bytes_by_category"].values()) == report["bytes"]
        layers = {entry["format"]: entry["layers"] for entry in report["formats"]}
        final = {"w8_weight_only": 1}
        assert layers == {"w4p64_token": 36, "w4p64_weight_only": 6} | final
    table = ditq("inspect", out)
    assert table.exit_code == 0
    assert "packed with smoothquant" in table.stdout


def test_a_packed_model_is_not_converted_again(ditq, tmp_path):
    ditq("convert", "demo:digits", tmp_path / "once", "--method", "linear")
    result = ditq("convert", tmp_path / "once", tmp_path / "twice", "--method", "linear")
    assert result.exit_code == 1
    assert "quantized already" in str(result.exception)


def test_demo_prints_its_checks(ditq, tmp_path, monkeypatch):
    """The command's own part; the work is tested with run_showcase."""
    report = {
        "checks": [{"what": "SQNR, dB", "value": 41.25, "at_least": 35.0, "ok": True}],
        "seconds": 3.2,
    }
    asked = []
    monkeypatch.setattr(
        "ditq_converters.showcase.run_showcase", lambda out, s: asked.append((out, s)) or report
    )
    result = ditq("demo", "--out", tmp_path / "demo", "--quick")
    assert result.exit_code == 0, result.output
    assert "41.2" in result.stdout
    assert "index.html" in result.stdout
    assert asked[0][0] == tmp_path / "demo"
    assert asked[0][1].steps < 50
    assert json.loads(ditq("demo", "--json").stdout) == report


@pytest.mark.parametrize("command", ["inspect", "calibrate", "plan", "convert", "demo"])
def test_help_has_an_example(ditq, command):
    result = ditq(command, "--help")
    assert result.exit_code == 0
    assert f"ditq {command}" in " ".join(result.stdout.split())


def test_a_model_that_draws_prompts_is_converted_without_any(ditq, tmp_path):
    result = ditq("convert", "demo:digits-flow", tmp_path / "out", "--weights", "w4p")
    assert result.exit_code == 0, result.output
    assert UNFED in result.stderr
    assert not (tmp_path / "out.stats").exists()
    assert open_folder(tmp_path / "out").nbytes < 1_700_000
