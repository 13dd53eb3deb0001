"""An evaluation that processes share, or that was killed, has the figures of one that was made in one go."""

import pytest

from ditq_converters import Recipe, convert
from ditq_converters.evaluate import EvaluationSettings, evaluate
from ditq_converters.evaluate.parts import Task, folder_of
from ditq_runtime.calls.pipeline import with_transformers

SETTINGS = EvaluationSettings(steps=2, samples=6, few_samples=4, micro_batch=2)


@pytest.fixture(scope="module")
def pair(make_pipeline):
    """A packed pipeline and the float one, and their evaluation in memory."""
    pipe = make_pipeline()
    packed = with_transformers(pipe, {"transformer": convert(pipe, Recipe("linear"), quiet=True)})
    return packed, pipe, evaluate(packed, pipe, SETTINGS, quiet=True)


@pytest.fixture
def measured(monkeypatch):
    """The inputs that were measured here; raises when it comes to the one in `measured.stop`."""

    class Measured(list):
        stop = None

    made, real = Measured(), Task.measure

    def measure(task, index):
        if index == made.stop:
            raise KeyboardInterrupt
        made.append(index)
        return real(task, index)

    monkeypatch.setattr(Task, "measure", measure)
    return made


def same(found, whole):
    """All figures but the seconds, and everything that was drawn, to the bit."""
    ours, theirs = ({**f.figures, "seconds": 0} for f in (found, whole))
    assert ours == theirs
    assert found.sqnr == whole.sqnr
    for side in ("float", "packed"):
        assert found.images[side].equal(whole.images[side])
        assert found.latents[side].equal(whole.latents[side])
    for mine, other in zip(found.layers, whole.layers, strict=True):
        assert mine.relative.equal(other.relative)
        assert mine.max_abs.equal(other.max_abs)


def test_processes_share_an_evaluation(pair, measured, tmp_path, monkeypatch):
    """Three inputs, and files that all of them read; the last to read removes them."""
    packed, pipe, whole = pair
    out = tmp_path / "report"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    same(evaluate(packed, pipe, SETTINGS, out, quiet=True), whole)
    assert measured == [1, 0, 2]
    assert (out / "report.json").exists()
    monkeypatch.setenv("RANK", "0")
    same(evaluate(packed, pipe, SETTINGS, out, quiet=True), whole)
    assert measured == [1, 0, 2]  # it found all of them
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_killed_evaluation_goes_on(pair, measured, tmp_path):
    packed, pipe, whole = pair
    out, measured.stop = tmp_path / "report", 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(packed, pipe, SETTINGS, out, quiet=True)
    assert not out.exists()
    measured.stop = None
    same(evaluate(packed, pipe, SETTINGS, out, quiet=True), whole)
    assert measured == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_what_other_settings_left_is_not_used(pair, measured, tmp_path):
    packed, pipe, whole = pair
    out, measured.stop = tmp_path / "report", 1
    others = EvaluationSettings(steps=3, samples=6, few_samples=4, micro_batch=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(packed, pipe, others, out, quiet=True)
    assert folder_of(out).exists()
    measured.stop = None
    same(evaluate(packed, pipe, SETTINGS, out, quiet=True), whole)
    assert measured == [0, 0, 1, 2]
