"""The peak of a run whose weights stay on disk, read from /proc, against its budget; and of one that loads them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = 28
# The budget is what docs/performance_conversion.md promises to suffice: the libraries, 12 times the largest block, and
# slack; for calibration 20 MiB more. Each
# job is a fork of one process that has imported everything: its peak is its own. What the libraries hold is the peak of
# the same job on a model of one block, which is loaded.
JOBS = """
import json, os, sys
from pathlib import Path
import torch
from diffusers import DiTTransformer2DModel
from ditq_converters import Recipe, calibrate, convert, open_model
from ditq_converters.memory import peak_rss

torch.set_num_threads(1)
folder, blocks = Path(sys.argv[1]), int(sys.argv[2])

def build(name, blocks):
    model = DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=48, in_channels=4, out_channels=8,
        num_layers=blocks, sample_size=8, patch_size=2, num_embeds_ada_norm=10)
    model.save_pretrained(folder / name, max_shard_size="10MB")
    return sum(4 * p.numel() for p in model.parameters())

def run(job, name, budget, out):
    model = open_model(str(folder / name), memory_budget=budget)
    if job == "convert":
        convert(model, Recipe("linear"), out=folder / out, quiet=True)
    else:
        calibrate(
            model, folder / out, steps=1, samples=1, guidance=1.0, memory_budget=budget, quiet=True
        )
    return next(model.transformer_blocks[0].parameters()).is_meta

def forked(function, *arguments):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, json.dumps([function(*arguments), peak_rss()]).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    return json.loads(os.read(read, 4096))

large, small = (forked(build, name, count)[0] for name, count in (("large", blocks), ("small", 1)))
room = 12 * (large - small) // (blocks - 1) + 16 * 2**20
beside = {"convert": 0, "calibrate": 20 * 2**20}
found = {"bytes": large, "room": room}
for job in ("convert", "calibrate"):
    libraries = forked(run, job, "small", None, job)[1]
    budget = libraries + room + beside[job]
    streamed = forked(run, job, "large", budget, job + "_streamed")
    loaded = forked(run, job, "large", None, job + "_loaded")
    found[job] = {"budget": budget, "streamed": streamed, "loaded": loaded}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Bytes of the model and of its room; of each job its budget, and [weights on disk, peak] of two runs."""
    rooms = [str(ROOT), *(str(ROOT / room) for room in ("kernels", "converters"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(rooms), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-W", "ignore", "-c", JOBS]
    arguments += [str(tmp_path_factory.mktemp("memory")), str(BLOCKS)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("job", ["convert", "calibrate"])
def test_a_streamed_run_stays_under_its_budget_and_a_loaded_one_would_not(found, job):
    assert 60 * 2**20 < 1.5 * found["room"] < found["bytes"]
    on_disk, peak = found[job]["streamed"]
    assert on_disk
    assert peak <= found[job]["budget"]
    on_disk, peak = found[job]["loaded"]
    assert not on_disk
    assert peak > found[job]["budget"]
