"""A calibration killed at any moment of its writes and run again ends with the bytes of one that was not."""

import json
import random

import pytest
from diffusers import DiTPipeline
from safetensors import safe_open

from ditq_converters import calibrate


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("call_*.safetensors"))}


JOB = "calibrate(pipe, {out!r}, 5, 3, 2.0, 'ddpm', micro_batch=2, quiet=True, rows=8)"
MULTISTEP = "calibrate(pipe, {out!r}, 5, 3, 2.0, 'dpmsolver++', micro_batch=2, quiet=True, rows=8)"


@pytest.fixture(scope="module")
def killed(killable, make_pipeline, tmp_path_factory):
    """A model on disk, the shards of an uninterrupted run, and how many write events such a run has."""
    folder = tmp_path_factory.mktemp("killed")
    make_pipeline().save_pretrained(folder / "model")
    killable.prepare(f"pipe = open_model({str(folder / 'model')!r})")
    out = folder / "whole"
    events = killable.run(JOB.format(out=str(out)), slow=True)
    assert len(shards(out)) == 5
    with safe_open(out / "call_0004.safetensors", "pt") as file:
        assert file.get_tensor("transformer_blocks.1.fc2.rows").shape == (8, 256)
    return str(folder / "model"), shards(out), (out / "manifest.json").read_bytes(), events


@pytest.mark.parity("P22")
def test_a_killed_run_resumes_to_the_same_bytes(killable, killed, tmp_path):
    """P22: killed at six moments of its writes, in six folders, then run again."""
    _, whole, manifest, events = killed
    rng, unfinished = random.Random(1), 0
    for attempt, event in enumerate(sorted(rng.sample(range(1, events), 6))):
        out = tmp_path / str(attempt)
        job = JOB.format(out=str(out))
        assert killable.kill_at(job, event, rng.uniform(0, 0.02))
        before = shards(out) if out.exists() else {}
        assert all(whole[name] == data for name, data in before.items())  # whole or not there
        unfinished += 0 < len(before) < 5
        killable.run(job)
        assert shards(out) == whole
        assert (out / "manifest.json").read_bytes() == manifest
        assert not (out / "state.safetensors").exists()
    assert unfinished >= 3  # the kills met runs that had done some calls and not all


@pytest.mark.parity("P22")
def test_a_multistep_sampler_resumes_to_the_same_bytes(killable, killed, tmp_path):
    """Its history is in the resume point: without it the next step would be of first order."""
    whole = tmp_path / "whole"
    events = killable.run(MULTISTEP.format(out=str(whole)), slow=True)
    rng, unfinished = random.Random(3), 0
    for event in (events // 3, events // 2, 2 * events // 3):
        out = tmp_path / str(event)
        job = MULTISTEP.format(out=str(out))
        assert killable.kill_at(job, event, rng.uniform(0, 0.02))
        unfinished += 0 < len(shards(out)) < 5
        killable.run(job)
        assert shards(out) == shards(whole)
    assert unfinished >= 2


def test_a_run_killed_again_and_again_gets_there(killable, killed, tmp_path):
    _, whole, _, events = killed
    job, rng = JOB.format(out=str(tmp_path)), random.Random(2)
    for _ in range(4):
        killable.kill_at(job, rng.randrange(1, events // 3), rng.uniform(0, 0.02))
    killable.run(job)
    assert shards(tmp_path) == whole


def test_a_resumed_run_leaves_no_temporary_files(killable, killed, tmp_path):
    """A kill inside a write leaves a hidden .part file; the run that finishes the job removes it."""
    _, _, _, events = killed
    job = JOB.format(out=str(tmp_path))
    for event in range(5, 12):
        killable.kill_at(job, min(event, events - 1), 0.0)
        if list(tmp_path.glob(".*.part")):
            break
    assert list(tmp_path.glob(".*.part"))  # some kill did leave one
    killable.run(job)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"call_{call:04d}.safetensors" for call in range(5)),
        "manifest.json",
    ]


def test_the_resume_point_is_used(killable, killed, tmp_path):
    """After a kill the model runs only for the calls that are not on disk."""
    model, whole, _, events = killed
    job = JOB.format(out=str(tmp_path))
    killable.kill_at(job, events * 2 // 3, 0.0)
    state = tmp_path / "state.safetensors"
    done = len(shards(tmp_path))
    assert 1 <= done < 5
    assert state.exists()
    pipe, ran = DiTPipeline.from_pretrained(model), []
    pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    calibrate(pipe, tmp_path, 5, 3, 2.0, "ddpm", micro_batch=2, quiet=True, rows=8)
    # two micro-batches a call; a call whose shard is there but whose latents are not is run again
    assert len(ran) in (2 * (5 - done), 2 * (5 - done + 1))
    assert json.loads((tmp_path / "manifest.json").read_text())["calls"] == 5
    assert list(shards(tmp_path)) == list(whole)
