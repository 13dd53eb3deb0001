"""A calibration killed at any moment of its writes and run again ends with the bytes of one that was not."""

import fcntl
import random

import pytest
from diffusers import DiTPipeline

from ditq_converters import calibrate
from ditq_converters.calibrate.share import LOG

HOW = "steps=3, samples=5, batch=1, guidance=2.0, rows=8, quiet=True"
JOB = f"calibrate(pipe, {{out!r}}, sampler='ddpm', {HOW})"
SHARE = f"os.environ.update(RANK='{{rank}}', WORLD_SIZE='2'); calibrate(pipe, {{out!r}}, sampler='ddpm', {HOW})"


def files(folder):
    """Path -> bytes of every file, but for the log, which has times in it."""
    every = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in every if p.name != LOG}


def shards(folder):
    return {path.name for path in folder.glob("inputs/[0-9]*")}


@pytest.fixture(scope="module")
def killed(killable, make_pipeline, tmp_path_factory):
    """A model on disk, the files of an uninterrupted run, and how many write events such a run has."""
    folder = tmp_path_factory.mktemp("killed")
    make_pipeline().save_pretrained(folder / "model")
    killable.prepare(f"pipe = open_model({str(folder / 'model')!r})")
    out = folder / "whole"
    events = killable.run(JOB.format(out=str(out)), slow=True)
    assert len(shards(out)) == 5
    return str(folder / "model"), files(out), events


@pytest.mark.parity("P22")
def test_a_killed_run_resumes_to_the_same_bytes(killable, killed, tmp_path):
    """P22: killed at six moments of its writes, in six folders, then run again; nothing else is left."""
    _, whole, events = killed
    rng, unfinished = random.Random(1), 0
    for attempt, event in enumerate(sorted(rng.sample(range(1, 3 * events // 4), 6))):
        out = tmp_path / str(attempt)
        job = JOB.format(out=str(out))
        assert killable.kill_at(job, event, rng.uniform(0, 0.02))
        before = {name for name in shards(out) if out.exists()}
        for name in before:  # whole or not there
            assert (
                files(out / "inputs" / name).items()
                <= {
                    key.removeprefix(f"inputs/{name}/"): data for key, data in whole.items()
                }.items()
            )
        unfinished += 0 < len(before) < 5
        killable.run(job)
        assert files(out) == whole
    assert unfinished >= 2  # some kills met runs that had done some inputs and not all


def test_what_a_kill_after_the_last_write_leaves_goes_too(make_pipeline, tmp_path, capsys):
    def run(quiet=True):
        calibrate(make_pipeline(), tmp_path / "out", steps=2, samples=2, batch=1, quiet=quiet)

    run(quiet=False)
    assert "merging transformer: 2 of 2" in capsys.readouterr().err
    whole = files(tmp_path / "out")
    left = [tmp_path / "out" / name for name in ("inputs/.0001.lock", "locks/0001", "locks/merge")]
    left[1].parent.mkdir()
    for path in left:
        path.touch()
    with left[0].open("w") as held:  # by another process that adds inputs
        fcntl.flock(held, fcntl.LOCK_EX)
        run()
        assert files(tmp_path / "out").keys() - whole.keys() == {"inputs/.0001.lock"}
    run()
    assert files(tmp_path / "out") == whole
    assert not left[1].parent.exists()


def test_a_run_killed_again_and_again_gets_there(killable, killed, tmp_path):
    _, whole, events = killed
    job, rng = JOB.format(out=str(tmp_path)), random.Random(2)
    for _ in range(4):
        killable.kill_at(job, rng.randrange(1, events // 3), rng.uniform(0, 0.02))
    killable.run(job)
    assert files(tmp_path) == whole


def test_finished_inputs_are_not_run_again(killable, killed, tmp_path):
    model, whole, events = killed
    killable.kill_at(JOB.format(out=str(tmp_path)), events * 2 // 3, 0.0)
    done = len(shards(tmp_path))
    assert 1 <= done < 5
    pipe, ran = DiTPipeline.from_pretrained(model), []
    pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    how = {"steps": 3, "samples": 5, "batch": 1, "guidance": 2.0, "rows": 8, "quiet": True}
    calibrate(pipe, tmp_path, sampler="ddpm", **how)
    assert len(ran) == 3 * (5 - done)
    assert files(tmp_path) == whole


def test_two_processes_share_the_work_to_the_same_bytes(killable, killed, tmp_path):
    """Both at once; and when one is killed, the other takes over what it had begun."""
    _, whole, events = killed
    both = tmp_path / "both"
    job = JOB.format(out=str(both))
    ranks = f"c = os.fork(); os.environ.update(RANK=str(int(c > 0)), WORLD_SIZE='2'); {job}"
    killable.run(f"{ranks}; c and os.waitpid(c, 0)")
    assert files(both) == whole
    alone = tmp_path / "alone"
    assert killable.kill_at(SHARE.format(rank=0, out=str(alone)), events // 3, 0.0)
    killable.run(SHARE.format(rank=1, out=str(alone)))
    assert files(alone) == whole
