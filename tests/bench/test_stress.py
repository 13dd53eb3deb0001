"""The kill stress, short: it finds nothing in ditq, and would find a file that differs."""

import json

import pytest

from ditq_bench import stress


def test_killed_jobs_end_with_the_same_bytes(tmp_path, capsys):
    out = tmp_path / "stress"
    assert stress.main(["--kills", "4", "--out", str(out), "--seed", "1"]) == 0
    assert "every run ended with the same bytes" in capsys.readouterr().out
    outcomes = json.loads((out / "stress.json").read_text())["jobs"]
    assert [outcome["job"] for outcome in outcomes] == ["calibrate", "convert"]
    for outcome in outcomes:
        assert outcome["kills"] == outcome["identical"] == 2
        assert outcome["leftovers"] == []
    assert sum(outcome["alive"] for outcome in outcomes) >= 1
    whole = [path.name for path in (out / "calibrate_whole" / "out").iterdir()]
    assert sorted(whole) == ["calibrate.log", "inputs", "manifest.json", "merged"]
    assert (out / "convert_whole" / "out" / "model_index.json").exists()


class Forgetful:
    """A stand-in for jobs: a killed run leaves a file that the next one does not remove, and other bytes."""

    def run(self, job, out, kill_after=None, wait=False):
        out.mkdir(parents=True, exist_ok=True)
        if kill_after is not None:
            (out / ".left.part").write_text("")
        (out / "result").write_text("whole" if not (out / ".left.part").exists() else "other")
        return stress.Run(1.0, 0.5, kill_after is not None)


def test_a_difference_is_seen_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stress, "Runner", Forgetful)
    assert stress.main(["--kills", "4", "--out", str(tmp_path / "out")]) == 1
    assert "see the runs that differ" in capsys.readouterr().out
    calibrate, _ = json.loads((tmp_path / "out" / "stress.json").read_text())["jobs"]
    assert (calibrate["identical"], calibrate["leftovers"]) == (0, ["out/.left.part"])
    assert (tmp_path / "out" / "calibrate_000" / "out" / "result").read_text() == "other"


def test_misuse_touches_nothing(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    for arguments, sentence in (
        (["--kills", "1", "--out", str(tmp_path / "new")], "kills must be at least 2"),
        (["--out", str(tmp_path)], "holds thesis.txt, which no stress run made"),
    ):
        with pytest.raises(SystemExit) as stop:
            stress.main(arguments)
        assert stop.value.code == 1
        assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
