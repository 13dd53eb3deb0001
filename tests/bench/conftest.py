"""Triton releases besides the installed one: `make test` puts them into the folder .triton."""

import json
from pathlib import Path

import pytest

RELEASES = tuple(Path(__file__).with_name("triton_releases.txt").read_text().split())
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".triton"


@pytest.fixture(scope="session")
def triton_releases():
    """The oldest supported release, and the newest."""
    return RELEASES


@pytest.fixture(scope="session")
def gate_with(python_without_interpreter):
    """Take the census of everything with a Triton release, against the budget; returns what the command reports.

    What the committed table knows is not compiled, but for a sample: minutes become seconds.
    """

    def run(release):
        folder = FOLDER / release
        if not (folder / ".ready").exists():
            pytest.skip(f"no Triton {release} in {folder}: `make test` installs it")
        program = "from ditq_bench.cli import bench; bench()"
        known = ("--known", str(ROOT / "bench" / "results" / "census.csv"))
        printed = python_without_interpreter(
            "-c", program, "census", "--check", "--json", *known, expected=None, first=folder
        )
        return json.loads(printed)

    return run
