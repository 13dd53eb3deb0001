"""The attacks, short: they find nothing in ditq, and would find what is wrong."""

import csv
import json

import pytest

from ditq_bench.stress import command, kills, loading, reader, surroundings, writers
from ditq_bench.stress.outcome import PATIENCE, Tally, bounded, is_named, timed
from ditq_bench.stress.target import targets
from ditq_runtime.errors import CheckpointError
from ditq_runtime.format import folder as reading


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return targets(tmp_path_factory.mktemp("targets"))


def found(tallies):
    return [finding for tally in tallies for finding in tally.findings]


def test_the_reader_reads_right_or_refuses_by_name(damaged):
    tallies = reader.attack(*damaged, cases=1500, seed=1)
    assert found(tallies) == []
    assert [tally.cases for tally in tallies] == [300] * 5
    assert all(tally.named > 100 and tally.right for tally in tallies)


def test_so_does_from_pretrained(damaged):
    (tally,) = loading.attack(*damaged, cases=60, seed=1)
    assert tally.findings == []
    assert tally.named > 30
    assert tally.right + tally.named == 60


def test_surroundings_change_no_bit():
    (tally,) = surroundings.attack(cases=150, seed=1)
    assert (tally.right, tally.findings) == (150, [])


def test_nor_of_whole_models(tmp_path):
    sd3 = ["SD3Transformer2DModel"]
    (tally,) = surroundings.attack_models(tmp_path, surroundings.MODELS[:1], sd3)
    assert tally.findings == []
    assert tally.right == tally.cases == 2 * len(surroundings.SURROUNDINGS)


def test_two_writers_leave_one_whole_folder(tmp_path):
    (tally,) = writers.attack(tmp_path, pairs=1, seed=1)
    assert (tally.right, tally.findings) == (1, [])


def test_it_would_see_an_error_of_another_kind(damaged, monkeypatch):
    def broken(path, config):
        raise KeyError("quant_method")

    monkeypatch.setattr(reading, "is_packed", broken)
    tallies = reader.attack(*damaged, cases=5, seed=1)
    assert [bool(tally.findings) for tally in tallies] == [True, True, True, True, False]
    assert "KeyError" in tallies[1].findings[0]


def test_it_would_see_another_result(damaged, monkeypatch):
    monkeypatch.setenv("DITQ_VERIFY", "0")
    (tally,) = loading.attack(*damaged, cases=60, seed=1)
    assert any(finding.endswith("another result") for finding in tally.findings)


def test_it_would_see_a_hang_and_an_allocation():
    tally = Tally("x", 0)
    assert PATIENCE <= 30
    with bounded():
        for number, work in enumerate(
            (lambda: bytearray(1 << 40), lambda: __import__("signal").raise_signal(14))
        ):
            try:
                with timed():
                    work()
            except BaseException as error:
                tally.add(number, "work", error)
    assert [finding.split(": ")[2] for finding in tally.findings] == ["MemoryError", "Hang"]


def test_a_named_error_is_ours_and_one_sentence():
    def caught(work):
        try:
            work()
        except Exception as error:
            return error
        return None

    ours = caught(lambda: reading.read_json(__import__("pathlib").Path("nowhere")))
    assert type(ours) is CheckpointError
    assert is_named(ours)
    assert not is_named(caught(lambda: json.loads("{")))  # a ValueError, of another home
    assert not is_named(caught(lambda: int("x")))


def test_the_command_line_tells_and_keeps_what_came(tmp_path, capsys):
    path = tmp_path / "stress.csv"
    for seed in ("3", "4"):
        line = ["surroundings", "--cases", "5", "--seed", seed, "--csv", str(path)]
        assert command.main(line) == 0
    assert "surroundings: 5 cases, seed 3" in capsys.readouterr().out
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [(row["kind"], row["seed"], row["right"]) for row in rows] == [
        ("surroundings", "3", "5"),
        ("surroundings", "4", "5"),
    ]
    assert all(row["commit"] for row in rows)
    for wrong in (["nothing"], ["reader", "--cases", "0"]):
        with pytest.raises(SystemExit) as stop:
            command.main(wrong)
        assert stop.value.code == 2


def test_killed_jobs_end_with_the_same_bytes(tmp_path):
    out = tmp_path / "stress"
    outcomes = kills.stress(4, out, seed=1)
    assert [outcome.job for outcome in outcomes] == ["calibrate", "convert"]
    for outcome in outcomes:
        assert outcome.kills == outcome.identical == 2
        assert outcome.leftovers == ()
    assert sum(outcome.alive for outcome in outcomes) >= 1
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
        return kills.Run(1.0, 0.5, kill_after is not None)


def test_a_difference_is_seen_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "Runner", Forgetful)
    calibrate, _ = kills.stress(4, tmp_path / "out")
    assert (calibrate.identical, calibrate.leftovers) == (0, ("out/.left.part",))
    assert (tmp_path / "out" / "calibrate_000" / "out" / "result").read_text() == "other"


def test_misuse_touches_nothing(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    for number, out, sentence in (
        (1, tmp_path / "new", "kills must be at least 2"),
        (4, tmp_path, "holds thesis.txt, which no stress run made"),
    ):
        with pytest.raises(ValueError, match=sentence):
            kills.stress(number, out)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
