"""`ditq sample` and `ditq eval` on text pipelines, and a sentence where prompts and classes are confused."""

import json

import pytest
from PIL import Image

# diffusers' DPM-Solver copies a tensor by np.array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
FAMILIES = ["pixart-sigma", "sd3", "flux"]
SMALL = ("--steps", 1, "--height", 16, "--width", 16)


@pytest.fixture(scope="module")
def digits(ditq, tmp_path_factory):
    """A packed pipeline that draws classes."""
    folder = tmp_path_factory.mktemp("digits")
    assert ditq("convert", "demo:digits", folder / "out", "--method", "linear") == 0
    return folder / "out"


@pytest.mark.parametrize("name", FAMILIES)
def test_sample_draws_from_text(ditq, packed_folder, prompts_file, tmp_path, capsys, name):
    both = ("--prompt", "a green door", "--prompts", prompts_file)
    command = ("sample", packed_folder(name), *both, *SMALL, "--cfg", 2)
    capsys.readouterr()
    assert ditq(*command, "--out", tmp_path / "all.png", "--json", "--report") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["steps"]) == (3, 1)
    assert found["report"]["totals"]["integer_linears"] > 10
    assert ditq(*command, "--out", tmp_path / "split.png", "--batch", 1) == 0
    images = [Image.open(tmp_path / f"{stem}.png") for stem in ("all", "split")]
    assert images[0].size == (3 * 16 + 2 * 2, 16)
    # batches of three and of one: sums in another order move a code by one, and a pixel with it
    assert max(abs(a - b) for a, b in zip(*(i.tobytes() for i in images), strict=True)) <= 3


@pytest.mark.parametrize(
    "name", ["pixart-sigma", "flux"]
)  # guided in two halves, and told its guidance
def test_eval_judges_text_pipelines(
    ditq, packed_folder, float_folder, prompts_file, tmp_path, name
):
    told = ("--reference", float_folder(name), "--prompts", prompts_file, "--few-samples", 2)
    plan = ("--steps", 1, "--samples", 2, "--cfg", 2, "--height", 16, "--width", 16)
    assert ditq("eval", packed_folder(name), *told, *plan, "--out", tmp_path / "report") == 0
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (figures["settings"]["inputs"], figures["settings"]["steps"]) == (2, 1)
    if name == "flux":  # told its guidance: what it predicts is what the scheduler is given
        assert figures["sqnr"]["free"] == figures["sqnr"]["forced"]  # one step, from equal noise
    assert (
        figures["sqnr"]["forced"]["mean_db"] > 30
    )  # an error of 1 % is 40 dB, and guidance 2 adds to it
    for errors in figures["layers"].values():
        assert errors
        assert all(0 < error < 0.1 for error in errors.values())
    assert figures["images"]["psnr_db"] > 20
    assert (tmp_path / "report" / "samples-difference.png").exists()


def refusal(ditq, capsys, *command):
    capsys.readouterr()
    assert ditq(*command) == 1
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return next(line for line in lines if line.startswith("ditq: "))


def test_classes_and_prompts_are_not_confused(
    ditq, packed_folder, float_folder, digits, prompts_file, tmp_path, capsys
):
    flux, out = packed_folder("flux"), ("--out", tmp_path / "never.png")
    for command, sentence in (
        (
            (flux, "--class-labels", "3"),
            "FluxPipeline draws from text and has no classes; give --prompt",
        ),
        ((flux,), "FluxPipeline draws from text; give --prompt TEXT, or --prompts FILE"),
        ((digits, "--prompt", "a fox"), "DiTPipeline draws classes, not text; give --class-labels"),
        ((digits, "--prompts", prompts_file), "DiTPipeline draws classes, not text"),
        ((digits, "--width", 16), "DiTPipeline draws images of one size; leave them out"),
    ):
        assert sentence in refusal(ditq, capsys, "sample", *command, *out)
    assert not (tmp_path / "never.png").exists()
    report = ("--out", tmp_path / "report", "--quick")
    reference = ("--reference", float_folder("flux"))
    for command, sentence in (
        (
            (flux, *reference),
            "evaluate: FluxPipeline needs inputs: prompts, or the arguments of its calls",
        ),
        (
            (digits, "--reference", "demo:digits", "--prompts", prompts_file),
            "evaluate: DiTPipeline draws classes, not text; pass labels, not prompts",
        ),
        (
            (digits, "--reference", "demo:digits", "--height", 16),
            "evaluate: DiTPipeline takes no argument 'height'; its arguments are class_labels",
        ),
    ):
        assert sentence in refusal(ditq, capsys, "eval", *command, *report)
    assert not (tmp_path / "report").exists()
