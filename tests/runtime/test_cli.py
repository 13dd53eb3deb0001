"""The `ditq` command as a user meets it: exit codes, one-line errors, JSON, and a PNG of the right size."""

import importlib
import json
import shutil
import sys
import tomllib  # pytest needs it there
from importlib.metadata import EntryPoint
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError

import ditq_kernels as k
from ditq_kernels.launch.backend import TORCH_OPS, TRITON_OPS
from ditq_runtime.calls.schedulers import SAMPLERS
from ditq_runtime.cli import app, output
from ditq_runtime.cli.doctor import WHY
from ditq_runtime.cli.sentences import sentence

ROOT = Path(__file__).parents[2]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
    app.GROUP
]


def _exists(target):
    try:
        module, _, name = target.partition(":")
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False


FOUND = {name: target for name, target in COMMANDS.items() if _exists(target)}


def _lines():
    """Every command line that does something: a command, or a subcommand of a group."""
    for name, target in FOUND.items():
        command = EntryPoint(name, target, app.GROUP).load()
        if isinstance(command, typer.Typer):
            for info in command.registered_commands:
                yield name, info.name or info.callback.__name__
        else:
            yield (name,)


LINES = [*_lines()]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The commands of pyproject.toml, as if the distribution were installed."""
    entries = [EntryPoint(name, target, app.GROUP) for name, target in FOUND.items()]
    monkeypatch.setattr(app, "entry_points", lambda group: entries if group == app.GROUP else [])
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def ditq(capsys):
    """Runs a command line: exit code, stdout, stderr."""

    def run(*arguments):
        capsys.readouterr()
        code = app.run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def _one_line(text):
    """The only line of an error, without progress bars."""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    assert len(lines) == 1, text
    assert lines[0].startswith("ditq: ")
    assert "Traceback" not in text
    return lines[0]


def test_every_command_of_the_project_is_there():
    assert {*FOUND, "bench"} == {*COMMANDS} == {*app.ORDER}


def test_help_lists_the_commands_in_the_order_a_user_meets_them(ditq):
    code, out, err = ditq("--help")
    assert (code, err) == (0, "")
    listed = [line.split()[0] for line in out[out.index("Commands") :].splitlines()[1:] if line]
    assert [name for name in listed if name in COMMANDS] == [n for n in app.ORDER if n in FOUND]
    assert "--debug" in out


@pytest.mark.parametrize("line", [(), ("bench",)], ids=["ditq", "bench"])
def test_help_cuts_no_sentence(ditq, line, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = ditq(*line, "--help")
    assert (code, err) == (0, "")
    assert "..." not in out.replace("[ARGS]...", "")
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_help_of_every_command_has_an_example(ditq, line):
    code, out, err = ditq(*line, "--help")
    assert (code, err) == (0, "")
    assert f"ditq {' '.join(line)}" in out.partition("Example")[2]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_an_unknown_option_is_misuse_in_one_line(ditq, line):
    code, out, err = ditq(*line, "--no-such-option")
    assert (code, out) == (2, "")
    message = _one_line(err)
    assert "--no-such-option" in message
    assert f"`ditq {' '.join(line)}" in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nonsense"], "nonsense"),
        (["sample"], "Missing argument"),
        (["sample", "x", "--steps", "0"], "--steps"),
        (["sample", "x", "--steps", "many"], "--steps"),
        (["sample", "x", "--batch", "0"], "--batch"),
        (["sample", "x", "--seed", "-1"], "--seed"),
        (["sample", "x", "--columns", "0"], "--columns"),
        (["sample", "x", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16"),
        (
            ["sample", "x", "--backend", "gpu"],
            "--backend must be one of auto, reference, cpu, triton",
        ),
        (["doctor", "extra"], "extra"),
    ],
)
def test_misuse_exits_with_2_in_one_line(ditq, arguments, part):
    code, out, err = ditq(*arguments)
    assert (code, out) == (2, "")
    assert part in _one_line(err)


def test_no_arguments_show_the_help(ditq):
    code, out, err = ditq()
    assert code == 2
    assert "sample" in out + err


def test_the_script_exits_with_the_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ditq", "doctor", "--json"])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def folder(packed_folder):
    """A packed pipeline folder."""
    return packed_folder("w8_static")


def test_sample_writes_a_grid_of_the_right_size(ditq, folder, tmp_path):
    png = tmp_path / "deep" / "x.png"
    code, out, _ = ditq(
        "sample", folder, "--class-labels", "3, seven,999", "--steps", 2, "--columns", 2,
        "--batch", 2, "--out", png, "--json",
    )  # fmt: skip
    assert code == 0
    result = json.loads(out)
    assert result["images"] == 3
    assert (result["out"], result["steps"], result["dtype"]) == (str(png), 2, "float32")
    assert result["backend"] in ("reference", "cpu", "triton")
    assert result["seconds_per_image"] == pytest.approx(result["seconds"] / 3)
    with Image.open(png) as image:
        # two columns and two rows of 32 pixels, gaps of 2
        assert (image.format, image.size) == ("PNG", (66, 66))
    assert [path.name for path in png.parent.iterdir()] == ["x.png"]


def test_sample_speaks_to_people_and_shows_its_report(ditq, folder, tmp_path):
    arguments = ["--class-labels", "7", "--steps", 1, "--out", tmp_path / "x.png", "--report"]
    code, out, _ = ditq("sample", folder, *arguments)
    assert code == 0
    assert "12 of 20 linears in integers" in out
    assert f"{tmp_path / 'x.png'}: 1 images, 1 steps" in out.splitlines()[-1]
    code, out, _ = ditq("sample", folder, *arguments, "--json")
    assert json.loads(out)["report"]["totals"]["integer_linears"] == 12


def test_sample_draws_the_classes_the_pipeline_names_and_repeats_itself(ditq, folder, tmp_path):
    first, again, other, split = (tmp_path / f"{name}.png" for name in "abcd")
    short = ["--steps", 2, "--cfg", "1"]
    code, out, _ = ditq("sample", folder, *short, "--out", first, "--json")
    assert (code, json.loads(out)["images"]) == (0, 2)  # three and seven
    ditq("sample", folder, *short, "--out", again)
    assert again.read_bytes() == first.read_bytes()
    ditq("sample", folder, *short, "--out", other, "--seed", 5)
    assert other.read_bytes() != first.read_bytes()
    ditq("sample", folder, "--steps", 2, "--cfg", "4", "--out", other)
    assert other.read_bytes() != first.read_bytes()
    # each image has its own seed, so a batch of one draws the same but for rounding
    ditq("sample", folder, *short, "--batch", 1, "--out", split)
    with Image.open(first) as together, Image.open(split) as alone:
        expected, got = np.asarray(together).astype(int), np.asarray(alone)
        assert np.abs(expected - got).max() <= 2


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
def test_sample_with_another_sampler(ditq, folder, tmp_path):
    """The same image as a pipeline with that scheduler of diffusers, through the PNG, exactly."""
    names = [name for name in SAMPLERS if name != "flow"]
    for name in names:
        code, _, err = ditq(
            "sample", folder, "--steps", 3, "--sampler", name, "--class-labels", "3",
            "--out", tmp_path / f"{name}.png",
        )  # fmt: skip
        assert code == 0, err
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.scheduler = getattr(diffusers, SAMPLERS[name]).from_config(pipe.scheduler.config)
        generator = [torch.Generator().manual_seed(0)]
        options = {"guidance_scale": 1.5, "num_inference_steps": 3}
        torch.manual_seed(0)
        (image,) = pipe([3], generator=generator, **options).images
        with Image.open(tmp_path / f"{name}.png") as png:
            assert np.array_equal(np.asarray(png), np.asarray(image))
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in names}) == len(names)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sample_in_half_precision(ditq, folder, tmp_path, dtype):
    code, out, _ = ditq(
        "sample", folder, "--steps", 1, "--dtype", dtype, "--out", tmp_path / "x.png", "--json"
    )
    assert (code, json.loads(out)["dtype"]) == (0, dtype)


def _refused(ditq, tmp_path, *arguments):
    code, out, err = ditq("sample", *arguments, "--steps", 1, "--out", tmp_path / "refused.png")
    assert (code, out) == (1, "")
    assert not [*tmp_path.glob("*refused*")]
    line = _one_line(err)
    assert "unexpected" not in line
    return line


def test_sample_refuses_what_is_no_packed_pipeline(ditq, folder, pipes, tmp_path):
    pipes["own"].save_pretrained(tmp_path / "float")
    assert "a float model" in _refused(ditq, tmp_path, tmp_path / "float")
    assert "`ditq convert" in _refused(ditq, tmp_path, tmp_path / "float" / "transformer")
    assert "built-in float model" in _refused(ditq, tmp_path, "demo:digits")
    for alone in (folder / "transformer", f"{folder}/transformer/"):
        line = _refused(ditq, tmp_path, alone)
        assert "a transformer alone makes latents, not images; name a .safetensors" in line
    assert "no config.json there" in _refused(ditq, tmp_path, tmp_path / "nowhere")


def test_sample_refuses_a_damaged_checkpoint_by_name(ditq, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert file.name in _refused(ditq, tmp_path, copy)


@pytest.mark.parametrize("labels", ["1000", "eight", "-1", "3,,7", "1.5", "\u00b2"])
def test_sample_refuses_labels_that_are_no_classes(ditq, folder, tmp_path, labels):
    line = _refused(ditq, tmp_path, folder, "--class-labels", labels)
    assert "--class-labels" in line
    assert "three" in line
    assert "seven" in line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("sample", "MODEL", "--out", "TMP"), "holds something else (file); name a new folder"),
        (("sample", "MODEL", "--out", "TMP/x.jpg"), "its name must end in .png"),
        (("sample", "MODEL", "--out", "/proc/x.png"), "nothing can be written in /proc"),
        (("sample", "MODEL", "--cfg", "nan"), "--cfg must be a finite number, got nan"),
        (("calibrate", "MODEL", "--out", "TMP/s", "--cfg", "inf"), "--cfg must be a finite number"),
        (("calibrate", "MODEL", "--out", "TMP/file/s"), "is a file; choose another place"),
        (("convert", "MODEL", "TMP/file/out"), "is a file; choose another place"),
        (("convert", "MODEL", "TMP/o", "--max-shard-size", "banana"), "such as 500MB or 10GB"),
        (("convert", "MODEL", "TMP/o", "--max-shard-size", "0GB"), "such as 500MB or 10GB"),
        (("convert", "MODEL", "."), "is the current folder"),
        (("eval", "MODEL", "--reference", "MODEL", "--out", "/proc/r"), "nothing can be written"),
        (("eval", "MODEL", "--reference", "MODEL", "--samples", "1"), "greater than or equal to 2"),
        (("demo", "--out", "/proc/demo"), "nothing can be written in /proc"),
        (("bench", "model", "MODEL", "--modes", "graph"), "graph needs a CUDA GPU"),
    ],
)
def test_options_are_checked_before_the_model_is_opened(ditq, tmp_path, arguments, sentence):
    """MODEL does not exist, and is not what is complained about."""
    if "graph" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    given = [a.replace("MODEL", "/no/model").replace("TMP", str(tmp_path)) for a in arguments]
    code, _, err = ditq(*given)
    assert code in (1, 2)
    assert sentence in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_sample_refuses_what_this_machine_cannot_do(ditq, folder, tmp_path):
    line = _refused(ditq, tmp_path, folder, "--backend", "triton")
    assert "--backend: 'triton' needs CUDA tensors, and these are on cpu" in line
    assert "cuda" in _refused(ditq, tmp_path, folder, "--device", "cuda").lower()
    assert "--cuda-graph needs a CUDA GPU" in _refused(ditq, tmp_path, folder, "--cuda-graph")


def test_sample_refuses_a_sampler_that_does_not_fit(ditq, folder, tmp_path):
    assert "--sampler must be one of ddim" in _refused(ditq, tmp_path, folder, "--sampler", "heun")
    line = _refused(ditq, tmp_path, folder, "--sampler", "flow")
    assert "trained with diffusion; take ddim or ddpm" in line


def test_sample_refuses_a_device_that_does_not_exist(ditq, folder, tmp_path):
    assert "abacus" in _refused(ditq, tmp_path, folder, "--device", "abacus")


def test_sample_refuses_an_output_it_cannot_write(ditq, folder, tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "x.png"
    code, _, err = ditq("sample", folder, "--steps", 1, "--out", target)
    assert code == 1
    assert str(tmp_path / "file") in _one_line(err.splitlines()[-1])


def test_a_failure_is_one_line_and_debug_adds_the_traceback(ditq, tmp_path):
    code, out, err = ditq("sample", tmp_path / "nowhere")
    assert (code, out) == (1, "")
    line = _one_line(err)
    command = ["sample", tmp_path / "nowhere"]
    for arguments in (["--debug", *command], [*command, "--debug"]):
        code, _, err = ditq(*arguments)
        assert code == 1
        assert "Traceback (most recent call last)" in err
        assert err.splitlines()[-1] == line


def test_a_failure_that_nobody_expected_says_so_in_one_line(ditq, folder, monkeypatch):
    def fail(*arguments):
        raise KeyError("wheel\nbearing")

    monkeypatch.setattr("ditq_runtime.cli.sample.check_backend", fail)
    code, _, err = ditq("sample", folder)
    assert code == 1
    assert "unexpected KeyError" in _one_line(err)
    assert "--debug" in err


def test_an_interrupt_is_one_line(ditq, folder, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("ditq_runtime.cli.sample.check_backend", interrupt)
    code, _, err = ditq("sample", folder)
    assert code == 130
    assert "interrupted" in _one_line(err.strip())


def test_doctor_names_versions_devices_and_backends(ditq):
    code, out, err = ditq("doctor", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["python"].startswith("3.")
    cpu = report["devices"][0]
    assert cpu["device"] == "cpu"
    assert [row[0] for row in cpu["ops"]] == sorted(TRITON_OPS | TORCH_OPS)
    assert [row[1] for row in cpu["ops"]] == [k.backend_of(row[0], "cpu") for row in cpu["ops"]]
    assert len(report["devices"]) == 1 + torch.cuda.device_count()


def test_doctor_speaks_to_people(ditq):
    code, out, err = ditq("doctor")
    assert (code, err) == (0, "")
    assert torch.__version__ in out
    for op in TRITON_OPS | TORCH_OPS:
        assert op in out
    assert WHY["reference"].split(",")[0] in out


@pytest.mark.parametrize("part", [[], ["transformer"]])
def test_inspect_prints_json_of_a_packed_folder(ditq, folder, part):
    code, out, err = ditq("inspect", folder.joinpath(*part), "--json")
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out), dict)


@pytest.mark.parametrize(
    "text", ["a :smile: b", "[red]x", "[/closed]", "[bold", "\\[x]", "demo:digits:1", "x" * 300]
)
def test_text_is_printed_as_it_is(capsys, text):
    output.say(text)
    assert capsys.readouterr().out == f"{text}\n"
    output.print_json({"path": text})
    assert json.loads(capsys.readouterr().out) == {"path": text}
    output.complain(text)
    assert capsys.readouterr().err == f"ditq: {text}\n"


@pytest.mark.parametrize("text", ["a :smile: b", "[red]x", "[/closed]", "K [N, K]"])
def test_cells_and_titles_of_a_table_are_printed_as_they_are(capsys, text):
    output.print_table(text, (text,), [[text], ["other"]])
    assert capsys.readouterr().out.count(text) == 3


def test_numbers_in_a_table_are_readable(capsys):
    output.print_table(
        "sizes", ("name", "bytes", "share"), [["a", 1234567, 0.123456], ["b", 5, 1.0]]
    )
    out = capsys.readouterr().out
    assert "1,234,567" in out
    assert "0.123" in out
    assert "0.1234" not in out


def test_mebibytes():
    assert output.mebibytes(3 * 2**20 + 2**18) == "3.25 MiB"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/somewhere/file"),
        OSError(28, "No space left on device"),  # of a file that is open
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_said_to_be_full(error):
    told = sentence(error)
    assert told.removeprefix("/somewhere/file: ") == (
        "the disk is full; free some space and run the same command again"
    )
    assert ("/somewhere/file" in told) == (getattr(error, "filename", None) is not None)


def test_other_errors_of_safetensors_keep_their_sentence():
    assert sentence(SafetensorError("Error while deserializing header: x")).startswith("not a read")
