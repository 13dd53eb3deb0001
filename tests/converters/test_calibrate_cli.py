"""`ditq calibrate`: its options, and misuse that is refused before anything is written."""

import json

import pytest
import typer
from typer.testing import CliRunner

from ditq_converters import CalibrationStats
from ditq_converters.cli.calibrate import calibrate
from ditq_runtime.cli.checked import Checked

SITE = "transformer_blocks.0.qkv"


@pytest.fixture(scope="module")
def run():
    app = typer.Typer()
    app.command(cls=Checked)(calibrate)
    return lambda *arguments: CliRunner().invoke(app, ["demo:digits", *map(str, arguments)])


def test_options_reach_the_statistics(run, tmp_path):
    out, labels = tmp_path / "stats", tmp_path / "labels"
    labels.write_text("three\n9\n")
    result = run(
        "--out", out, "--steps", 2, "--sampler", "dpmsolver++", "--rows", 6, "--labels", labels, "--memory-budget",
        "1TiB", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report, stats = json.loads(result.stdout), CalibrationStats.open(out)
    assert stats.manifest["sampler"] == "DPMSolverMultistepScheduler"
    (call,) = (call for call in stats.replay() if call.timestep == stats.timesteps[0])
    assert call.kwargs["class_labels"].tolist() == [3, 9, 1000, 1000]
    assert stats.rows(SITE)[0].shape[:2] == (2, 6)
    assert report["timesteps"] == {"transformer": stats.timesteps}
    assert report["inputs"] == 1
    assert 50 * 2**20 < report["peak_rss_bytes"] < 2**40


def test_a_file_of_calls_is_run_line_by_line(run, tmp_path):
    path = tmp_path / "calls.jsonl"
    path.write_text(
        '{"class_labels": [3], "num_inference_steps": 2, "seed": 5}\n'
        '{"class_labels": [4, 5], "num_inference_steps": 3, "guidance_scale": 1.0}\n'
    )
    result = run("--out", tmp_path / "stats", "--inputs", path)
    assert result.exit_code == 0, result.output
    assert "3 timesteps of transformer from 2 inputs" in " ".join(result.stdout.split())
    stats = CalibrationStats.open(tmp_path / "stats")
    # 500, 0 and 666, 333, 0: four timesteps in three bins, of one, one and two
    assert stats.timesteps == [666.0, 500.0, 166.5]
    assert sorted({call.timestep for call in stats.replay()}) == [0.0, 333.0, 500.0, 666.0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--prompts", __file__, "--labels", __file__),
            "--labels and --prompts say the same in two ways; give one",
        ),
        (("--labels", __file__, "--samples", "3"), "one class per sample; leave --samples out"),
        (("--prompts", "captions.txt"), "--prompts: no file at captions.txt; check the path"),
        (("--memory-budget", "plenty"), "a number and a unit, such as 6GiB"),
        (("--rows", "-1"), "--rows"),
        (("--sampler", "heun"), "ddim, ddpm, dpmsolver++, euler, flow"),
    ],
)
def test_misuse_exits_with_2_and_touches_nothing(run, tmp_path, arguments, sentence):
    result = run("--out", tmp_path / "stats", *arguments)
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_prompts_for_a_class_conditional_model_are_refused(run, tmp_path):
    (tmp_path / "captions.txt").write_text("a seven\n")
    result = run("--out", tmp_path / "stats", "--prompts", tmp_path / "captions.txt")
    assert result.exit_code == 1
    assert "DiTPipeline draws classes, not text; pass labels, not prompts" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["captions.txt"]


def test_a_bad_labels_file_names_its_line(run, tmp_path):
    (tmp_path / "labels").write_text("1\neleven\n")
    result = run("--out", tmp_path / "stats", "--labels", tmp_path / "labels")
    assert result.exit_code == 1
    assert "line 2: unknown class 'eleven'" in str(result.exception)
    assert not (tmp_path / "stats").exists()


def test_a_budget_that_is_too_small_says_what_is_needed(run, tmp_path):
    result = run("--out", tmp_path / "stats", "--memory-budget", "10MiB")
    assert result.exit_code == 1
    assert "10.0 MiB is too small" in str(result.exception)
    assert not (tmp_path / "stats").exists()
