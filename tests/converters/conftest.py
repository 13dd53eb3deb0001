"""What the converter tests share: tiny random models, and a process that can be killed and started again at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
ROOMS = [str(ROOT), *(str(ROOT / room) for room in ("kernels", "converters", "bench"))]

TINY = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_num_groups": 32,
}


@pytest.fixture(scope="session")
def make_dit():
    """A tiny DiT in eval mode: 2 blocks, 64 wide, 16 tokens, AdaLN far from its zero initialization."""

    def make(seed=0, **overrides):
        # a generator of its own: the global one is left as it was
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DiTTransformer2DModel(**{**TINY, **overrides}).eval()
            for block in model.transformer_blocks:
                torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
                torch.nn.init.normal_(block.norm1.linear.bias, std=0.4)
        return model.requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def make_pipeline(make_dit):
    """A real DiTPipeline around a tiny DiT, with class names."""

    def make(seed=0, **overrides):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            vae = AutoencoderKL(
                block_out_channels=(4,),
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=2,
                sample_size=8,
                scaling_factor=1.0,
            ).eval()
        scheduler = DDIMScheduler(clip_sample=False)
        names = {"0": "tench, Tinca tinca", "1": "goldfish", "7": "cock"}
        pipe = DiTPipeline(make_dit(seed, **overrides), vae, scheduler, id2label=names)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def inputs():
    """A batch of 3 for a tiny DiT: mixed timesteps, mixed classes, the null class."""

    def make(model, seed=1):
        config, generator = model.config, torch.Generator().manual_seed(seed)
        shape = (3, config.in_channels, config.sample_size, config.sample_size)
        latents = torch.randn(shape, generator=generator, dtype=torch.float64)
        return {
            "hidden_states": latents.to(next(model.parameters()).dtype),
            "timestep": torch.tensor([999, 500, 1]),
            "class_labels": torch.tensor([3, 207, 1000]),
        }

    return make


# Imports once, then forks a child per job, so that a killed run costs no second import of torch.
# A child tells how far it is by appending a byte to a file at every write, and dawdles there.
ZYGOTE = """
import os, shutil, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
import diffusers, safetensors.torch
from diffusers.utils import logging
import ditq_runtime.files
from ditq_converters import CalibrationStats, Recipe, calibrate, convert, open_model
logging.disable_progress_bar()
PAUSE = 0.01

def slow_down(events):
    log = os.open(events, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    def event():
        os.write(log, b".")
        time.sleep(PAUSE)
    def save_file(tensors, path, metadata=None):
        data = safetensors.torch.save(tensors, metadata)
        with open(path, "wb") as file:
            for start in range(0, len(data), len(data) // 3 + 1):
                file.write(data[start : start + len(data) // 3 + 1])
                file.flush()
                event()
    def around(function):
        def slow(*args, **kwargs):
            event()
            result = function(*args, **kwargs)
            event()
            return result
        return slow
    safetensors.torch.save_file = save_file
    for name in ("merge", "shards"):  # the package's name is also a function's
        sys.modules[f"ditq_converters.calibrate.{name}"].save_file = save_file
    for name in ("rename", "replace", "fsync"):
        setattr(os, name, around(getattr(os, name)))
    shutil.copyfile = around(shutil.copyfile)  # a move that copies would not be atomic

print("ready", flush=True)
for line in sys.stdin:
    events, _, job = line.strip("\\n").partition("\\t")
    if events == "prepare":
        exec(job)
        print("prepared", flush=True)
        continue
    child = os.fork()
    if child == 0:
        try:
            if events:
                slow_down(events)
            exec(job)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if sys.stdin.readline().strip() == "kill":
        os.kill(child, signal.SIGKILL)  # not waited for yet, so the pid is still this child's
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Killable:
    """Jobs in a process of their own, killed between or inside their writes."""

    def __init__(self, folder):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(ROOMS), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ZYGOTE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._events = folder / "events"
        if self._process.stdout.readline() != "ready\n":
            self.close()
            raise RuntimeError("the process for jobs did not start; see its stderr")

    def _start(self, job, slow):
        self._events.unlink(missing_ok=True)
        self._say(f"{self._events if slow else ''}\t{job}")

    def _say(self, line):
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _status(self):
        return int(self._process.stdout.readline())

    def prepare(self, code):
        """Run code once, in the process that all later jobs are forked from."""
        self._say(f"prepare\t{code}")
        assert self._process.stdout.readline() == "prepared\n"

    def run(self, job, slow=False):
        """Let a job end; return how many write events it had (0 unless slow)."""
        self._start(job, slow)
        self._say("wait")
        assert self._status() == 0
        return self.events()

    def events(self):
        """Write events so far."""
        return self._events.stat().st_size if self._events.exists() else 0

    def kill_at(self, job, event, delay):
        """SIGKILL a job `delay` seconds after its write event number `event`; True if it was still alive."""
        self._start(job, slow=True)
        deadline = time.monotonic() + 60
        while self.events() < event and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        self._say("kill")
        return os.WIFSIGNALED(self._status())

    def close(self):
        """End the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)


@pytest.fixture(scope="module")
def killable(tmp_path_factory):
    """See `Killable`."""
    process = Killable(tmp_path_factory.mktemp("killable"))
    yield process
    process.close()
