"""The GPU script: stages are limited, skipped with a reason, and do not stop one another; its pieces run on a CPU."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from ditq_bench.gpu_run import gemms, models, questions, small, summary
from ditq_bench.gpu_run.place import Place, compare
from ditq_bench.host import cases
from ditq_bench.tune.problems import PROBLEMS
from ditq_kernels.launch import backend, tuning
from ditq_runtime.families.fusible import fusible_blocks, why_not

ROOT = Path(__file__).resolve().parents[2]
# Triton 3.6's interpreter takes range() over one-element arrays, which numpy 2.4 will refuse
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *gpu_run.summary*) [ -n "${{NO_SUMMARY:-}}" ] || exec {python} "$@" ;;
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
    chosen = "tune,tests,sanitizer,kernels_digits,pack_w8,model_w8"
    done = run_script(tmp_path, "--dry-run", "out", PYTHON=fake_python, STAGES=chosen)
    assert done.returncode == 1, done.stderr
    stages = stages_of(tmp_path / "out")
    assert list(stages) == chosen.split(",")
    assert stages["kernels_digits"] == ("failed", "exit code 7: the third tile is wrong")
    assert stages["tests"] == ("skipped", "no GPU")
    assert stages["tune"] == ("ok", "")
    page = (tmp_path / "out" / "summary.md").read_text()
    assert "| kernels_digits | failed |" in page


def test_a_hanging_stage_is_ended(tmp_path, fake_python):
    script = (ROOT / "bench" / "gpu_run.sh").read_text()
    path = tmp_path / "bench" / "gpu_run.sh"
    path.parent.mkdir()
    path.write_text(script.replace("stage questions 300", "stage questions 1"))
    for room in ("kernels", "converters", "ditq_runtime"):
        (tmp_path / room).symlink_to(ROOT / room)
    (tmp_path / "bench" / "ditq_bench").symlink_to(ROOT / "bench" / "ditq_bench")
    done = subprocess.run(
        ["bash", str(path), "--dry-run", str(tmp_path / "out")],
        env=os.environ | {"PYTHON": fake_python, "STAGES": "questions,pack_w8", "NO_SUMMARY": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert stages_of(tmp_path / "out") == {
        "questions": ("failed", "ran past 1 seconds"),
        "pack_w8": ("ok", ""),
    }


def test_what_no_time_is_left_for_is_listed_as_not_run(tmp_path):
    chosen = {"PYTHON": "true", "STAGES": "small,tune", "TOTAL_SECONDS": "4"}
    done = run_script(tmp_path, "--dry-run", "out", **chosen)
    assert done.returncode == 0
    assert stages_of(tmp_path / "out") == dict.fromkeys(
        ("small", "tune"), ("not run", "no time left")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(tmp_path):
    done = run_script(tmp_path, "out", PYTHON=sys.executable)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu_run: needs an NVIDIA GPU")
    assert run_script(tmp_path).returncode == 2


def test_every_kernel_has_a_small_problem():
    names = {name for name, _ in small.cases(Place(torch.device("cpu"), dry_run=True))}
    assert names >= backend.TRITON_OPS
    assert names >= set(tuning.load_table("sm_90")["ops"])


@pytest.mark.parametrize("name", sorted([*small.WITHOUT_TABLE, *small.VARIANTS]))
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_small_problems_run(name):
    """Those of the launch tables run in the tests of the tuner."""
    (call,) = (
        call for op, call in small.cases(Place(torch.device("cpu"), dry_run=True)) if op == name
    )
    assert small._fault(call()) == ""


def test_a_failing_kernel_does_not_hide_the_others(monkeypatch, capsys):
    def broken():
        raise ValueError("no such tile")

    made = [
        ("first", broken),
        ("second", lambda: torch.full((1,), torch.nan)),
        ("third", lambda: torch.ones(1)),
    ]
    monkeypatch.setattr(small, "cases", lambda place: made)
    monkeypatch.setattr(sys, "argv", ["small", "--dry-run"])
    with pytest.raises(SystemExit, match="first: no such tile; second: an output is not finite"):
        small.main()
    assert capsys.readouterr().out.splitlines()[-1] == "third "


def test_questions_are_answered_and_a_failing_one_does_not_stop_the_others(tmp_path, monkeypatch):
    def broken(place):
        """Does it break?"""
        yield {"case": "first", "median_us": 1.0}
        raise RuntimeError("no such tile")

    monkeypatch.setitem(questions.QUESTIONS, "broken", broken)
    place = Place(torch.device("cpu"), dry_run=True)
    seen = []
    names = ["broken", "rows", "split"]
    report = questions.ask(
        place, names, 600, lambda partial: seen.append(len(partial["questions"]))
    )
    assert sorted(set(seen)) == [1, 2, 3]  # after every answer
    assert len(seen) == 1 + 4 + 4 + len(names) + 1
    found = report["questions"]
    assert found["broken"]["error"] == "no such tile"
    assert len(found["broken"]["answers"]) == 1
    assert [len(found[name]["answers"]) for name in ("rows", "split")] == [4, 4]
    assert all(answer["median_us"] > 0 for answer in found["rows"]["answers"])
    assert questions.ask(place, ["rows"], budget=-1)["questions"]["rows"]["error"] == "no time left"
    (tmp_path / "questions.json").write_text(json.dumps(report))
    (tmp_path / "stages.tsv").write_text("questions\tok\t3\t\n")
    page = summary.summary(tmp_path)
    assert "### split" in page
    assert "Failed: no such tile" in page
    assert "these times mean nothing" in page


def limits_of(plan):
    """Seconds of each stage of a run, as the script states them."""
    script = (ROOT / "bench" / "gpu_run.sh").read_text()
    ends = {
        "A": ('[ "$plan" = A ]; then', 'elif [ "$plan" = B ]'),
        "B": ('[ "$plan" = B ]; then', "\nfi\n"),
    }
    body = script.split(ends[plan][0], 1)[1].split(ends[plan][1], 1)[0]
    named = re.findall(r"stage (\w+) (?:\$\(\()?(\d+)", body)
    looped = re.search(r"for question in (.*); do", body)
    return dict(named) | dict(pair.split(":") for pair in (looped[1].split() if looped else ()))


@pytest.mark.parametrize("plan", ["A", "B"])
def test_a_run_of_five_minutes_has_limits_that_leave_time_to_start(plan):
    assert sum(map(int, limits_of(plan).values())) == 255


@pytest.mark.parametrize("plan", ["A", "B"])
def test_a_run_leaves_three_files_and_goes_on_after_a_failing_stage(tmp_path, fake_python, plan):
    done = run_script(
        tmp_path,
        "--rehearse",
        plan,
        "out",
        PYTHON=fake_python,
        STAGES="gemms,models,host,rows,tests",
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "results.tgz",
        "stages.tsv",
        "summary.md",
    ]
    stages = stages_of(tmp_path / "out")
    expected = {"models": ("skipped", "no diffusers"), "gemms": ("ok", ""), "host": ("ok", "")}
    assert stages == (
        expected if plan == "A" else {"tests": ("skipped", "no GPU"), "rows": ("ok", "")}
    )
    with tarfile.open(tmp_path / "out" / "results.tgz") as archive:
        assert "./stages.tsv" in archive.getnames()
    assert run_script(tmp_path, "--rehearse", "out").returncode == 2


def test_the_stages_of_kernels_are_rehearsed_through_the_stub(tmp_path):
    """Without diffusers: the machine of a run has torch and Triton."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['diffusers'] = None\n")
    done = run_script(
        tmp_path, "--rehearse", "A", "out", PYTHON=sys.executable, STAGES="gemms,host",
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert stages_of(tmp_path / "out") == {"gemms": ("ok", ""), "host": ("ok", "")}
    with tarfile.open(tmp_path / "out" / "results.tgz") as archive:
        rows = {
            name: [json.loads(line) for line in archive.extractfile(f"./{name}.jsonl")]
            for name in ("gemms", "host")
        }
    assert {row["candidate"] for row in rows["gemms"]} >= {
        "cuBLAS bf16",
        "torch._int_mm",
        "W8A8",
        "W4A8",
    }
    assert not [row for row in rows["gemms"] if "wrong" in row]
    assert {row["call"] for row in rows["host"]} == set(cases.calls(torch.device("cpu")))


def test_variants_are_rehearsed_through_the_stub(tmp_path):
    """Programs that stay, in one loop and in two, TMA, whole tiles and tiles in parts: compiled and launched."""
    done = run_script(
        tmp_path, "--rehearse", "B", "out", PYTHON=sys.executable, STAGES="variants,parts"
    )
    assert done.returncode == 0, done.stdout
    assert stages_of(tmp_path / "out") == {"variants": ("ok", ""), "parts": ("ok", "")}
    found = {}
    with tarfile.open(tmp_path / "out" / "results.tgz") as archive:
        for name in ("variants", "parts"):
            report = json.load(archive.extractfile(f"./{name}.json"))
            found[name] = [row["launch"] for row in report["questions"][name]["answers"]]
    staying = [launch for launch in found["variants"] if "persistent" in launch]
    assert any("two loops" in launch for launch in staying)
    assert any("tma" in launch for launch in staying)
    assert any("tma" not in launch and "two loops" not in launch for launch in staying)
    assert sorted(launch.rpartition("stages")[2] for launch in found["parts"]) == [
        "", ", 2 parts", ", 4 parts",
    ]  # fmt: skip
    refused = [launch for launch in found["variants"] if launch.startswith("refused")]
    assert all(
        "specialize=True" in launch for launch in refused
    )  # which Triton 3.7 does not compile


def test_a_launch_with_another_result_voids_its_row_only(monkeypatch):
    bucket = Place(torch.device("cpu"), dry_run=True).bucket("quantize_static", 32, 128)
    wrong = tuning.RowConfig(8, 4)
    monkeypatch.setitem(
        PROBLEMS, "quantize_static", lambda *_: lambda config: torch.ones(1) * (config == wrong)
    )
    launches = [wrong, tuning.RowConfig(2, 4)]
    rows = list(compare(Place(torch.device("cpu"), dry_run=True), bucket, launches))
    assert sorted(row["launch"] for row in rows if "median_us" in row) == [
        "2, 4 warps",
        "4, 4 warps",
    ]
    (other,) = (row["launch"] for row in rows if "median_us" not in row)
    assert other.startswith("refused: tune: ")


def test_a_wrong_answer_voids_its_row_only(monkeypatch):
    calls = {
        "right": (lambda i: torch.ones(2), torch.ones(2)),
        "wrong": (lambda i: torch.zeros(2), torch.ones(2)),
    }
    monkeypatch.setattr(gemms, "calls", lambda *arguments: calls)
    monkeypatch.setattr(gemms, "SHAPES", {"one": (64, 64)})
    monkeypatch.setattr(gemms, "TOKENS", (8,))
    found = {row["candidate"]: row for row in gemms.rows_of(torch.device("cpu"), False, 0.1)}
    assert found["wrong"]["wrong"] == "relative error 1"
    assert found["right"]["median_us"] > 0


def test_random_models_have_every_way():
    """On a CPU: packed, without a graph; the blocks run fused and the values are finite."""
    device = torch.device("cpu")
    model = models.random_model("dit", models.TINY["dit"], device, "w4p")
    assert [why_not(block) for block in fusible_blocks(model).values()] == [""]
    inputs = models.inputs_of("dit", model, 1, device)
    (name, step), *_ = models.ways(model, inputs, packed=True)
    assert name == "ditq W8A8, eager"
    with torch.no_grad():
        assert step()[0].isfinite().all()
