"""The GPU script: stages are limited, skipped with a reason, and do not stop one another; its pieces run on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditq_bench.gpu_run import questions, summary

ROOT = Path(__file__).resolve().parents[2]
# Triton 3.6's interpreter takes range() over one-element arrays, which numpy 2.4 will refuse
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *gpu_run.summary*) exec {python} "$@" ;;
  *" kernels "*) echo "the third tile is wrong"; exit 7 ;;
  *gpu_run.questions*) sleep 60 ;;
esac
"""


def run_script(tmp_path, *arguments, **variables):
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_run.sh"), *arguments],
        env=os.environ | variables, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip


@pytest.fixture
def fake_python(tmp_path):
    path = tmp_path / "python"
    path.write_text(FAKE_PYTHON.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def stages_of(out):
    lines = (out / "stages.tsv").read_text().splitlines()
    return {name: (status, reason) for name, status, _, reason in (x.split("\t") for x in lines)}


def test_a_failing_stage_is_named_and_the_next_ones_run(tmp_path, fake_python):
    chosen = "tests,sanitizer,kernels,pack_w8,model_w8,tune"
    done = run_script(tmp_path, "--dry-run", "out", PYTHON=fake_python, STAGES=chosen)
    assert done.returncode == 1, done.stderr
    stages = stages_of(tmp_path / "out")
    assert list(stages) == chosen.split(",")
    assert stages["kernels"] == ("failed", "exit code 7: the third tile is wrong")
    assert stages["tests"] == ("skipped", "no GPU")
    assert stages["tune"] == ("ok", "")
    page = (tmp_path / "out" / "summary.md").read_text()
    assert "| kernels | failed |" in page


def test_a_hanging_stage_is_ended(tmp_path, fake_python):
    script = (ROOT / "bench" / "gpu_run.sh").read_text()
    path = tmp_path / "bench" / "gpu_run.sh"
    path.parent.mkdir()
    path.write_text(script.replace("stage questions 240", "stage questions 1"))
    for room in ("kernels", "converters", "ditq_runtime"):
        (tmp_path / room).symlink_to(ROOT / room)
    (tmp_path / "bench" / "ditq_bench").symlink_to(ROOT / "bench" / "ditq_bench")
    done = subprocess.run(
        ["bash", str(path), "--dry-run", str(tmp_path / "out")],
        env=os.environ | {"PYTHON": fake_python, "STAGES": "questions,tune"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert stages_of(tmp_path / "out") == {
        "questions": ("failed", "ran past 1 seconds"),
        "tune": ("ok", ""),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(tmp_path):
    done = run_script(tmp_path, "out", PYTHON=sys.executable)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu_run: needs an NVIDIA GPU")
    assert run_script(tmp_path).returncode == 2


def test_questions_are_answered_and_a_failing_one_does_not_stop_the_others(tmp_path, monkeypatch):
    def broken(place):
        """Does it break?"""
        yield {"case": "first", "median_us": 1.0}
        raise RuntimeError("no such tile")

    monkeypatch.setitem(questions.QUESTIONS, "broken", broken)
    place = questions.Place(torch.device("cpu"), dry_run=True)
    report = questions.ask(place, ["broken", "rows", "tile_depth"], budget=600)
    found = report["questions"]
    assert found["broken"]["error"] == "no such tile"
    assert len(found["broken"]["answers"]) == 1
    assert [len(found[name]["answers"]) for name in ("rows", "tile_depth")] == [4, 4]
    assert all(answer["median_us"] > 0 for answer in found["rows"]["answers"])
    assert questions.ask(place, ["rows"], budget=-1)["questions"]["rows"]["error"] == "no time left"
    (tmp_path / "questions.json").write_text(json.dumps(report))
    (tmp_path / "stages.tsv").write_text("questions\tok\t3\t\n")
    page = summary.summary(tmp_path)
    assert "### tile_depth" in page
    assert "Failed: no such tile" in page
    assert "these times mean nothing" in page
