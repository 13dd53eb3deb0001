"""One file of inputs and five commands on pipelines of other tasks: two transformers, image to image, editing, control.

Tiny pipelines of real classes, saved and opened as folders; the same file serves calibration, sampling and evaluation.
"""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ditq_bench.zoo import PIPELINES
from ditq_converters import CalibrationStats, convert, evaluate, make_plan, open_model, read_plan
from ditq_converters.evaluate.inputs import open_packed
from ditq_converters.streaming.model import streamed_of
from ditq_converters.streaming.opening import open_in_pieces
from ditq_runtime.calls import sharing
from ditq_runtime.format.folder import transformer_folders

# a ControlNet of diffusers takes it from its old place
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
TASKS = {
    "Wan22": ("transformer", "transformer_2"),
    "SD3Img2Img": ("transformer",),
    "FluxKontext": ("transformer",),
    "FluxControlNet": ("transformer",),
}


def write_inputs(folder, calls):
    """JSON lines, pictures beside them; returns the file."""
    lines = []
    for call in calls:
        entry = dict(call)
        for name, value in call.items():
            if isinstance(value, Image.Image):
                value.save(folder / f"{name}.png")
                entry[name] = f"{name}.png"
        lines.append(json.dumps(entry))
    (folder / "calls.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "calls.jsonl"


@pytest.fixture(scope="module")
def folder_of(ditq, tmp_path_factory):
    """Name of a task -> folder with the float pipeline, its inputs, statistics and the packed pipeline."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = here = tmp_path_factory.mktemp(name)
            PIPELINES[name].build().save_pretrained(here / "float")
            inputs = write_inputs(here, PIPELINES[name].calls)
            pipe, plan = here / "float", here / "plan.json"
            stats = ("--stats", here / "stats")
            assert ditq("calibrate", pipe, "--inputs", inputs, "--out", here / "stats") == 0
            assert ditq("plan", pipe, *stats, "--out", plan) == 0
            assert ditq("convert", pipe, here / "out", "--plan", plan, *stats) == 0
        return made[name]

    return folder


@pytest.mark.parametrize("name", TASKS)
def test_every_transformer_is_converted_and_shown(folder_of, ditq, capsys, name):
    folder = folder_of(name)
    packed = {n: f for n, f in transformer_folders(folder / "out").items() if f.scheme}
    assert tuple(packed) == TASKS[name]
    plans = sorted(path.name for path in (folder / "out" / "ditq").glob("plan*"))
    assert len(plans) == len(packed)
    capsys.readouterr()
    assert ditq("inspect", folder / "out", "--verify", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [key for key in shown if key.startswith("transformer")] == list(TASKS[name][1:])
    sizes = [shown["bytes"], *(shown[other]["bytes"] for other in TASKS[name][1:])]
    assert sizes == [folder.nbytes for folder in packed.values()]


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_a_plan_says_which_transformers_it_is_for(folder_of, ditq, tmp_path, capsys, command):
    out = ("--out", tmp_path / "plan.json") if command == "plan" else ()
    capsys.readouterr()
    assert ditq(command, folder_of("Wan22") / "float", *out) == 0
    assert "transformer_2: the same layers, the plan is for it too" in capsys.readouterr().out


@pytest.mark.parametrize("name", TASKS)
def test_it_samples_and_compares_on_the_same_inputs(folder_of, ditq, tmp_path, capsys, name):
    folder = folder_of(name)
    inputs, out = ("--inputs", folder / "calls.jsonl"), folder / "out"
    capsys.readouterr()
    command = ("sample", out, *inputs, "--out", tmp_path / "x.png", "--report", "--json")
    assert ditq(*command) == 0
    shown = json.loads(capsys.readouterr().out)
    reports = [value for key, value in shown.items() if key.startswith("report")]
    assert [report["totals"]["integer_linears"] > 10 for report in reports] == [True] * len(
        TASKS[name]
    )
    with Image.open(tmp_path / "x.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 10
    told = ("--reference", folder / "float", *inputs, "--out", tmp_path / "report")
    assert ditq("eval", out, *told) == 0
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert figures["sqnr"]["forced"]["mean_db"] > 30  # an error of 3 %: 8 bits, random weights
    assert figures["sqnr"]["free"]["mean_db"] > 20


def test_a_folder_of_samples_is_shared_and_gone_on_with(
    folder_of, ditq, tmp_path, monkeypatch, capsys
):
    """The second of two processes makes the second input first; what is there is not made again."""
    folder = folder_of("SD3Img2Img")
    command = (
        "sample",
        folder / "out",
        "--inputs",
        folder / "calls.jsonl",
        "--out",
        tmp_path / "all",
    )
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sharing._own_first(4) == [1, 3, 0, 2]
    assert ditq(*command) == 0
    made = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert made == ["0000.png", "0001.png", "inputs.json"]
    first, second = ((tmp_path / "all" / name).read_bytes() for name in made[:2])
    (tmp_path / "all" / "0000.png").unlink()
    (tmp_path / "all" / "0001.png").write_bytes(b"mine")
    assert ditq(*command) == 0
    assert (tmp_path / "all" / "0000.png").read_bytes() == first != second
    assert (tmp_path / "all" / "0001.png").read_bytes() == b"mine"
    assert ditq(*command, "--sampler", "flow") == 1
    assert "holds samples of other sampler; name a new folder" in capsys.readouterr().err


def test_a_transformer_alone_draws_latents_from_embeddings(folder_of, ditq, tmp_path, capsys):
    folder = folder_of("SD3Img2Img")
    alone = folder / "out" / "transformer"
    config = json.loads((alone / "config.json").read_text())
    torch.manual_seed(0)
    widths = {
        "prompt_embeds": (2, 5, config["joint_attention_dim"]),
        "pooled_prompt_embeds": (2, config["pooled_projection_dim"]),
    }
    tensors = {name: torch.randn(shape) for name, shape in widths.items()}
    tensors |= {f"negative_{name}": tensor[:1] * 0 for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "texts.safetensors")
    side = 8 * config["sample_size"]
    size = ("--height", side, "--width", side, "--steps", 2)
    command = ("sample", alone, "--prompts", tmp_path / "texts.safetensors", *size)
    assert ditq(*command, "--out", tmp_path / "x.safetensors") == 0
    latents = load_file(tmp_path / "x.safetensors")["latents"]
    assert latents.shape == (2, config["in_channels"], config["sample_size"], config["sample_size"])
    assert latents.isfinite().all()
    assert not torch.equal(latents[0], latents[1])
    capsys.readouterr()
    assert ditq(*command, "--out", tmp_path / "x.png") == 1
    assert "makes latents, not images; name a .safetensors" in capsys.readouterr().err
    assert ditq("sample", alone, "--prompt", "a fox", "--out", tmp_path / "y.safetensors") == 1
    assert "give embeddings (prompt_embeds, ...) in place of text" in capsys.readouterr().err


def test_two_transformers_are_converted_from_disk_to_the_same_bytes(folder_of, tmp_path):
    """Also where diffusers calls them optional, and would load them in spite of the streamed ones."""
    folder = folder_of("Wan22")
    pieces = open_in_pieces(folder / "float", 2**40)
    assert all(streamed_of(model) for model in (pieces.transformer, pieces.transformer_2))
    stats = CalibrationStats.open(folder / "stats")
    convert(pieces, read_plan(folder / "plan.json"), stats, tmp_path / "out", quiet=True)
    for name in ("transformer", "transformer_2", "ditq"):
        files = sorted((folder / "out" / name).iterdir())
        assert [path.name for path in files] == sorted(
            p.name for p in (tmp_path / "out" / name).iterdir()
        )
        assert all(p.read_bytes() == (tmp_path / "out" / name / p.name).read_bytes() for p in files)


def test_a_transformer_that_no_plan_fits_stays_float_and_a_line_says_so(
    folder_of, tmp_path, capsys
):
    pipe = open_model(str(folder_of("Wan22") / "float"))
    plan = make_plan(pipe, method="linear")
    convert(pipe, {"transformer": plan}, out=tmp_path / "out")
    assert "transformer_2: stays float" in capsys.readouterr().err
    folders = transformer_folders(tmp_path / "out")
    assert [folder.scheme is None for folder in folders.values()] == [False, True]
    with pytest.raises(ValueError, match="no plan was given for it, but for transformer_2"):
        convert(pipe, {"transformer_2": plan}, quiet=True)
    packed = open_packed(tmp_path / "out")
    found = evaluate(packed, pipe, inputs=PIPELINES["Wan22"].calls, quiet=True)
    assert not any(name.startswith("transformer_2") for name in found.layers[0].names)
    assert len(found.sqnr["forced"].timesteps) < len(found.sqnr["free"].timesteps)
