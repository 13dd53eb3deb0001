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
