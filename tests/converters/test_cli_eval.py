"""`ditq eval` as a user types it: the report folder, exit codes, and a sentence for every misuse."""

import csv
import json
import re

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from ditq_bench.browser import MISSING, faults, find_browser
from ditq_converters import Recipe, calibrate, convert, open_model
from ditq_converters.cli.eval import evaluate_command
from ditq_converters.demo import export_demo
from ditq_converters.evaluate import evaluate
from ditq_converters.evaluate.report import write_npz
from ditq_converters.evaluate.several import names_of

SMALL = ("--steps", 3, "--samples", 4, "--few-samples", 2)
REFERENCE = ("--reference", "demo:digits")


@pytest.fixture(scope="module")
def ditq():
    app = typer.Typer()
    app.command()(evaluate_command)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pipe = open_model("demo:digits")
    stats = calibrate(pipe, folder / "stats", steps=2, samples=2, quiet=True)
    recipe = Recipe(weights="w4p", activations="static")
    convert(pipe, recipe, stats, folder / "out", quiet=True)
    return folder / "out"


@pytest.fixture(scope="module")
def report(ditq, packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    npz = out.parent / "samples.npz"
    result = ditq(packed, *REFERENCE, "--out", out, *SMALL, "--npz", npz, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return out, npz, json.loads(result.stdout)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_folder_holds_a_whole_report(report):
    out, _, printed = report
    assert sorted(path.name for path in out.iterdir()) == [
        "clip.csv",
        "clip.png",
        "index.html",
        "layers-cascade.png",
        "layers-forced-block.png",
        "layers.csv",
        "report.json",
        "samples-difference.png",
        "samples-float.png",
        "samples-packed.png",
        "sizes.png",
        "sqnr.csv",
        "sqnr.png",
    ]
    assert json.loads((out / "report.json").read_text()) == printed
    assert [path.name for path in out.parent.iterdir() if path.name.endswith(".part")] == []


def test_the_figures_make_sense(report):
    _, _, figures = report
    assert list(figures["sqnr"]) == ["free", "forced"]
    for curve in figures["sqnr"].values():
        assert len(curve["mean_of_ratios_db"]) == len(curve["ratio_of_sums_db"]) == 3
        assert 5 < curve["mean_db"] < 60
    assert 0 < figures["images"]["ssim"] < 1
    assert 10 < figures["images"]["psnr_db"] < 60
    assert figures["images"]["lpips"] is None
    assert 0 < figures["latents"]["relative_l2"] < 1
    assert figures["frechet"][0]["value"] is None
    assert "need at least 161, got 4" in figures["frechet"][0]["warning"]
    assert figures["frechet"][0]["warning"] in figures["notes"]
    assert set(figures["demo"]) == {"float", "packed"}
    assert figures["demo"]["packed"]["digit_fd"] is None
    assert len(figures["layers"]["cascade"]) == 30
    assert len(figures["layers"]["forced (block)"]) == 6
    assert len(figures["clip_fraction"]) == 36
    assert sum(figures["bytes"]["packed"].values()) == figures["bytes"]["packed_total"]


def test_the_tables_agree_with_the_figures(report):
    out, _, figures = report
    rows = rows_of(out / "sqnr.csv")
    for name, curve in figures["sqnr"].items():
        mine = [row for row in rows if row["mode"] == name]
        assert [row["step"] for row in mine] == ["1", "2", "3"]
        assert [float(row["timestep"]) for row in mine] == [666, 333, 0]
        for convention in ("mean_of_ratios_db", "ratio_of_sums_db"):
            assert [float(row[convention]) for row in mine] == curve[convention]
    layers = rows_of(out / "layers.csv")
    assert list(layers[0]) == [
        "mode", "layer", "step", "timestep", "relative_error", "sqnr_db", "max_abs", "cosine",
    ]  # fmt: skip
    assert len(layers) == (30 + 6) * 3
    for mode, means in figures["layers"].items():
        for name, mean in means.items():
            errors = [
                float(row["relative_error"])
                for row in layers
                if row["mode"] == mode and row["layer"] == name
            ]
            assert sum(errors) / 3 == pytest.approx(mean)
    clip = rows_of(out / "clip.csv")
    assert list(clip[0]) == ["layer", "step", "timestep", "clip_fraction"]
    assert len(clip) == 36 * 3


def test_the_page_stands_alone(report):
    out, _, _ = report
    html = (out / "index.html").read_text()
    references = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(references) >= 12
    assert all((out / name).is_file() for name in references)
    assert {path.name for path in out.glob("*.png")} <= set(references)
    assert not re.search(r"https?:|//|<script|@import|url\(", html)


@pytest.mark.skipif(find_browser() is None, reason=MISSING)
def test_the_page_fits_a_phone_and_a_screen(report):
    assert faults(report[0] / "index.html", find_browser()) == []


@pytest.mark.skipif(find_browser() is None, reason=MISSING)
def test_the_browser_finds_what_does_not_fit(tmp_path):
    page = tmp_path / "index.html"
    page.write_text('<p style="width:700px">wide</p><img src="gone.png"><p>text</p>')
    narrow = [fault for fault in faults(page, find_browser()) if "at 400 pixels" in fault]
    assert any("p sticks out: wide" in fault for fault in narrow)
    assert any("picture gone.png is missing" in fault for fault in narrow)
    wide = faults(page, find_browser(), (1280,))
    assert len(wide) == 1  # the picture


def test_a_checkpoint_is_called_by_what_tells_it_apart():
    assert names_of(["runs/a/packed", "runs/b/packed"]) == {
        "a": "runs/a/packed",
        "b": "runs/b/packed",
    }
    assert names_of(["a/x", "b/y"]) == {"x": "a/x", "y": "b/y"}
    assert names_of(["a/x", "b/x", "c/y"]) == {"a-x": "a/x", "b-x": "b/x", "c-y": "c/y"}
    assert names_of(["packed", "other/packed"]) == {
        "packed": "packed",
        "other-packed": "other/packed",
    }
    with pytest.raises(ValueError, match="stands there twice"):
        names_of(["x", "./x"])


def test_letters_can_be_read_on_a_phone(report):
    """A page of 400 pixels shows a plot 368 wide: its smallest letters, of 8 points, then have at least 7 pixels."""
    for path in report[0].glob("*.png"):
        if not path.name.startswith("samples"):
            with Image.open(path) as image:
                inches = image.width / image.info["dpi"][0]
            assert 8 / 72 * 368 / inches >= 7, path.name


def test_several_checkpoints_stand_side_by_side(ditq, packed, tmp_path):
    pipe = open_model("demo:digits")
    convert(pipe, Recipe("linear", weights="w8"), None, tmp_path / "w8", quiet=True)
    out = tmp_path / "report"
    result = ditq(packed, tmp_path / "w8", *REFERENCE, "--out", out, *SMALL, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    figures = json.loads(result.stdout)
    assert list(figures) == ["out", "w8"]
    assert figures == json.loads((out / "report.json").read_text())
    assert figures["w8"]["sqnr"]["free"]["mean_db"] > figures["out"]["sqnr"]["free"]["mean_db"] + 5
    alone = tmp_path / "alone"
    result = ditq(tmp_path / "w8", *REFERENCE, "--out", alone, *SMALL, "--json")
    assert json.loads(result.stdout)["sqnr"] == figures["w8"]["sqnr"]  # the float model drew once
    page = (out / "index.html").read_text()
    for name in ("out", "w8"):
        assert f'href="{name}/index.html"' in page
        assert 'href="../index.html"' in (out / name / "index.html").read_text()
    assert 'href="../report/index.html"' in (alone / "index.html").read_text()  # its neighbour
    browser = find_browser()
    assert browser is None or faults(out / "index.html", browser) == []


def test_samples_are_in_adms_format(report):
    with np.load(report[1]) as archive:
        assert archive.files == ["arr_0"]
        samples = archive["arr_0"]
    assert samples.shape == (4, 32, 32, 3)
    assert samples.dtype == np.uint8
    assert (samples[..., 0] == samples[..., 2]).all()
    assert samples.min() == 0
    assert samples.max() > 200


def test_an_npz_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("numpy.savez", fail)
    with pytest.raises(OSError, match="disk full"):
        write_npz(tmp_path / "x.npz", torch.zeros(2, 3, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_gives_the_same_figures(ditq, packed, report, tmp_path):
    result = ditq(packed, *REFERENCE, "--out", tmp_path / "r", *SMALL, "--json")
    again = json.loads(result.stdout)
    timeless = [{k: v for k, v in f.items() if k != "seconds"} for f in (report[2], again)]
    assert timeless[0] == timeless[1]


def test_people_get_a_table_and_a_link(ditq, packed, tmp_path):
    out = tmp_path / "deep" / "report"
    result = ditq(packed, *REFERENCE, "--out", out, "--steps", 20, "--samples", 2, "--quick")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "SQNR free, mean of ratios, dB" in result.stdout
    assert "note: FD-latent_pool4 is biased far upwards" in result.stdout
    assert str(out / "index.html") in result.stdout
    assert json.loads((out / "report.json").read_text())["settings"]["steps"] == 10


def test_transformers_alone_have_no_images(ditq, packed, tmp_path):
    reference = export_demo("demo:digits", tmp_path / "float") / "transformer"
    arguments = (packed / "transformer", "--reference", reference, "--out", tmp_path / "r")
    result = ditq(*arguments, *SMALL)
    assert result.exit_code == 0, (result.output, result.exception)
    figures = json.loads((tmp_path / "r" / "report.json").read_text())
    assert figures["images"] is None
    assert figures["demo"] is None
    assert any("images are not scored" in note for note in figures["notes"])
    assert not list((tmp_path / "r").glob("samples*"))
    refused = ditq(*arguments[:-1], tmp_path / "r2", *SMALL, "--npz", tmp_path / "x.npz")
    assert refused.exit_code == 1
    assert "there will be no images" in str(refused.exception)


def test_a_reference_that_is_another_model_is_noted(ditq, packed, tmp_path):
    arguments = ("--reference", "demo:digits-salient", "--out", tmp_path / "r", *SMALL, "--json")
    result = ditq(packed, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert (
        "not the model that the packed one was calibrated on"
        in json.loads(result.stdout)["notes"][0]
    )


def test_misuse_exits_with_2(ditq, packed, tmp_path):
    base = (packed, *REFERENCE, "--out", tmp_path / "r")
    wrong = [
        (packed, "--out", tmp_path / "r"),  # no --reference
        (packed, *REFERENCE),  # no --out
        (*base, "--steps", 0),
        (*base, "--samples", 0),
        (*base, "--few-samples", 0),
        (*base, "--batch", 0),
        (*base, "--seed", -1),
        (*base, "--sampler", "heun"),
        (*base, "--inputs", "a.jsonl", "--prompts", "b.txt"),
        (packed, packed.parent / "other", *base[1:], "--npz", tmp_path / "x.npz"),
    ]
    for arguments in wrong:
        assert ditq(*arguments).exit_code == 2, arguments
    assert list(tmp_path.iterdir()) == []


def test_refusals_are_one_sentence_and_leave_nothing(ditq, packed, tmp_path, make_dit):
    other = tmp_path / "other"
    make_dit().save_pretrained(other)
    cases = [
        ("demo:digits", REFERENCE, (), "built-in float model, not a packed folder"),
        (other, REFERENCE, (), "a float model, not a packed one"),
        (tmp_path / "nowhere", REFERENCE, (), "no config.json there"),
        (packed, ("--reference", packed), (), "is quantized already"),
        (packed, ("--reference", "demo:letters"), (), "unknown demo model"),
        (packed, ("--reference", other), (), "reference: its "),
        (packed, REFERENCE, ("--features", "nothing"), "expected module:function"),
        (packed, (packed, *REFERENCE), (), "stands there twice"),
        (packed, (other, *REFERENCE), (), "a float model, not a packed one"),
    ]
    for path, reference, extra, sentence in cases:
        result = ditq(path, *reference, "--out", tmp_path / "r", *SMALL, *extra)
        assert result.exit_code == 1, sentence
        assert sentence in str(result.exception)
        assert "\n" not in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_report_folder_in_use_is_refused_before_the_work(ditq, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = ditq(tmp_path / "nowhere", *REFERENCE, "--out", tmp_path)
    assert result.exit_code == 1
    assert "already exists" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_function_refuses_what_the_options_cannot(make_pipeline):
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="the first model is not packed"):
        evaluate(pipe, pipe, quiet=True)
