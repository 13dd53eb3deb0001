"""What may stand anywhere in a line: --quiet, --verbose, --csv; Ctrl-C; completion; the dtype of a checkpoint."""

import csv
import functools
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ditq_runtime.cli import app
from ditq_runtime.cli.opening import stored_dtype
from ditq_runtime.cli.voice import Voice, voice
from ditq_runtime.format.folder import TransformerFolder
from ditq_runtime.format.safetensors_header import TensorInfo

DITQ = [sys.executable, "-m", "ditq_runtime"]


@pytest.fixture(autouse=True)
def as_before():
    yield
    vars(voice).update(vars(Voice()))


def test_a_table_as_csv_leaves_sentences_out_of_stdout(capsys):
    assert app.run(["inspect", "demo:digits", "--csv"]) == 0
    out, err = capsys.readouterr()
    header, *rows = csv.reader(io.StringIO(out))
    assert header[:3] == ["site", "kind", "linears"]
    assert {len(row) for row in rows} == {len(header)}
    assert "fold plan of DiTTransformer2DModel" in err


def test_a_command_without_a_table_takes_no_csv(capsys):
    assert app.run(["sample", "x", "--csv"]) == 2
    assert "--csv" in capsys.readouterr().err


def test_quiet_and_verbose(tmp_path, capsys):
    line = ["calibrate", "demo:digits", "--steps", "1", "--samples", "1", "--rows", "0"]
    assert app.run(["--quiet", *line, "--out", str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    assert "1 timesteps of transformer" in out
    assert err == ""
    assert app.run([*line, "--out", str(tmp_path / "b"), "--verbose"]) == 0
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("calibrating: 1 of 1, ")
    assert err[-1].startswith("ditq: ")
    assert err[-1].endswith("MiB of main memory")


def test_bars_of_transformers_do_not_leak():
    """In a process of its own: the command is heard before transformers is imported, and downloads keep their bars."""
    program = (
        "from ditq_runtime.cli import app; assert app.run(['--version']) == 0; "
        "from transformers.utils import logging; from huggingface_hub.utils import are_progress_bars_disabled; "
        "print(logging.is_progress_bar_enabled(), logging.get_verbosity() == logging.ERROR); "
        "print(are_progress_bars_disabled())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.splitlines()[-2:] == ["False True", "False"]


def test_a_command_forgets_what_the_one_before_was_told():
    assert app.run(["--quiet", "--version"]) == 0
    assert voice.quiet
    assert app.run(["--version"]) == 0
    assert not voice.quiet
    assert voice.line == "ditq --version"


def test_an_interrupt_tells_how_to_go_on(tmp_path):
    """A real signal, in the middle of the work; the line it tells then finishes that work."""
    out = tmp_path / "some stats"
    line = [
        "calibrate",
        "demo:digits",
        "--out",
        str(out),
        "--steps",
        "4",
        "--samples",
        "64",
        "--batch",
        "2",
    ]
    # jobs in the background of a shell ignore the signal, and so would what they start
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(
        [*DITQ, *line], stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=heed
    )
    until = time.monotonic() + 120
    while not list(out.rglob("*.safetensors")) and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    err = running.communicate(timeout=60)[1].strip().splitlines()
    assert running.returncode == 130, err
    told = f"ditq: interrupted; what is finished is kept, go on with: ditq calibrate demo:digits --out '{out}'"
    assert err[-1].startswith(told)


@pytest.mark.parametrize(
    ("words", "expected"), [("ditq ca", "calibrate"), ("ditq sample --off", "--offload")]
)
def test_the_shell_completes(words, expected):
    asked = {
        "_DITQ_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    program = "import sys; sys.argv = ['ditq']; from ditq_runtime.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [expected], done.stderr


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_a_checkpoint_is_that_of_its_float_part(kind):
    def info(dtype, nbytes):
        return TensorInfo(dtype, (nbytes,), nbytes, Path("x"))

    headers = {
        "pos_embed": info(torch.float32, 10),
        "proj_out.weight": info(kind, 100),
        "blocks.0.weight": info(torch.int8, 1000),
    }
    assert stored_dtype(TransformerFolder(Path("x"), {}, [], headers)) == str(kind).removeprefix(
        "torch."
    )
