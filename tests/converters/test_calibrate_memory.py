"""A memory budget: parsed from words, counted as torch allocates, and kept by a whole run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditq_converters import calibrate
from ditq_converters.calibrate.memory import LiveBytes
from ditq_converters.memory import format_bytes, held, parse_bytes

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6GiB", 6 * 2**30), ("500MB", 500_000_000), (" 1.5 gib ", 3 * 2**29), ("1TiB", 2**40),
        ("7B", 7), ("64kb", 64_000), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_budgets_are_a_number_and_a_unit(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "6", "GiB", "-6GiB", "6 parsecs", "6GiBs", "1e3MB", "0GiB", "0.1B", "٣GiB", "6IB", "6Gi"],
)
def test_nonsense_is_refused_by_a_sentence(text):
    with pytest.raises(ValueError, match="a number and a unit, such as 6GiB"):
        parse_bytes(text)


def test_live_bytes_are_counted_as_they_come_and_go():
    weight = torch.ones(256, 256)
    with LiveBytes() as live:
        a = weight.t().reshape(-1)[:5]  # reshape copies: 256 KiB
        del a
        b = weight.view(-1)  # a view: nothing
        c = b + 1  # 256 KiB
        d = c.half()  # 128 KiB
        c.mul_(2)  # in place: nothing
        del c
        e = torch.zeros(1024)  # 4 KiB
        f = torch.empty(
            2**20, device="meta"
        )  # nothing: what weights that are on disk leave in a streamed model
    assert f.is_meta
    assert live.peak == 384 * 1024
    assert (d.numel(), e.numel()) == (65536, 1024)


def test_a_budget_lowers_the_samples_per_call(make_dit, tmp_path):
    model, batches = make_dit(), []
    model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    arguments = {"steps": 1, "samples": 6, "guidance": 1.0, "quiet": True}
    calibrate(model, tmp_path / "roomy", memory_budget=held(CPU) + 2**30, batch=4, **arguments)
    assert batches == [1, 4, 2]  # the probe, then the run; never more than asked for
    with pytest.raises(ValueError, match=r"1\.0 MiB is too small: .* are needed .*allow at least"):
        calibrate(model, tmp_path / "tight", memory_budget=2**20, **arguments)
    assert not (tmp_path / "tight").exists()


RUN = """
import sys, tempfile
import torch
from diffusers import DiTTransformer2DModel
from ditq_converters import calibrate
from ditq_converters.memory import held, peak_rss
torch.set_num_threads(1)
model = DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=8,
    num_layers=2, sample_size=32, patch_size=2, num_embeds_ada_norm=1000).eval().requires_grad_(False)
calibrate(model, tempfile.mkdtemp(), steps=1, samples=1, quiet=True)  # loads libraries, which the budget holds too
budget = held(torch.device("cpu")) + 80 * 2**20
stats = calibrate(model, tempfile.mkdtemp(), steps=2, samples=64, batch=32, memory_budget=budget, quiet=True)
print(64 // len(stats.manifest["inputs"]), budget, peak_rss())
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from /proc"
)
def test_the_peak_of_a_run_stays_under_its_budget():
    """A process of its own, so that its peak is this run's. 32 samples in a call would take 140 MiB."""
    rooms = [str(ROOT), *(str(ROOT / room) for room in ("kernels", "converters"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(rooms), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-W", "ignore", "-c", RUN]
    run = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    batch, budget, peak = (int(word) for word in run.stdout.split())
    assert 2 <= batch < 32
    assert peak <= budget


def test_bytes_are_shown_in_words():
    assert (format_bytes(3 * 2**29), format_bytes(2**19)) == ("1.50 GiB", "0.5 MiB")
