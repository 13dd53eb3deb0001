"""Triton is interpreted wherever there is no GPU. Set here, before any test imports it: diffusers does."""

import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def python_without_interpreter():
    """Run Python where Triton compiles, as on a user's machine; returns what it printed."""

    def run(*arguments, expected=0, **variables):
        environment = os.environ | variables
        environment.pop("TRITON_INTERPRET", None)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == expected, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture
def processor(monkeypatch):
    """Sets what torch says of this processor; puts that and all choices of backends back at the end."""
    monkeypatch.setattr("ditq_kernels.backend._reference_on", set())

    def has(**features):
        found = {"cpu_name": "Some CPU", "avx2": True, "avx512_vnni": False} | features
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)

    return has
