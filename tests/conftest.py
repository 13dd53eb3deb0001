"""Triton is interpreted wherever there is no GPU. Set here, before any test imports it: diffusers does."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def ditq():
    """Runs a command line of the project in this process, by this checkout's entry points; returns its exit code."""
    from ditq_runtime.cli import app  # not above: diffusers imports Triton

    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    listed = tomllib.loads(pyproject)["project"]["entry-points"][app.GROUP]
    entries = [EntryPoint(name, target, app.GROUP) for name, target in listed.items()]

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(app, "entry_points", lambda group: entries)
            return app.run([str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def python_without_interpreter():
    """Run Python where Triton compiles, as on a user's machine; returns what it printed.

    Where None is expected, a process may end with any code if it printed something; `first` is a folder to import from
    before all others.
    """

    def run(*arguments, expected=0, first="", **variables):
        environment = os.environ | variables
        environment.pop("TRITON_INTERPRET", None)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(first), *sys.path]))
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True
        )
        assert expected in (None, done.returncode), done.stderr[-2000:]
        assert done.stdout or not done.returncode or expected is not None, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture
def processor(monkeypatch):
    """Sets what torch says of this processor; puts that and all choices of backends back at the end."""
    monkeypatch.setattr("ditq_kernels.launch.backend._reference_on", set())
    monkeypatch.setattr("ditq_kernels.launch.prepared._kept", False)

    def has(**features):
        found = {"cpu_name": "Some CPU", "avx2": True, "avx512_vnni": False} | features
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)

    return has


@pytest.fixture
def row_by_row(monkeypatch):
    """Float products that do not depend on their batch: every sample (row of a matrix) is multiplied alone.

    Sums are ordered by the number of rows otherwise, the only thing that a sample's bits owe to its batch.
    """
    from ditq_kernels.reference import linear as reference

    def alone(plain):
        def split(x, *rest, **options):
            if x.dim() < 2 or len(x) < 2:
                return plain(x, *rest, **options)
            return torch.cat([plain(row[None], *rest, **options) for row in x])

        return split

    functional = torch.nn.functional
    for place, name in ((functional, "linear"), (functional, "conv2d"), (reference, "linear_w8")):
        monkeypatch.setattr(place, name, alone(getattr(place, name)))
