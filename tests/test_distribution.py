"""The wheel: what is in it; and that a newcomer gets from the sources of this checkout to a page in a browser."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOM_OF = {
    "ditq_kernels": "kernels",
    "ditq_runtime": ".",
    "ditq_converters": "converters",
    "ditq_bench": "bench",
}
SOURCES = (
    "kernels",
    "ditq_runtime",
    "converters",
    "bench",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout gets no build folder."""
    root = tmp_path_factory.mktemp("build")
    source = root / "source"
    source.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=skip)
        else:
            shutil.copy(path, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", root / "dist", source], check=True, capture_output=True)
    return next((root / "dist").glob("ditq-*.whl"))


def test_what_is_in_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(ROOM_OF)
    for package, room in ROOM_OF.items():
        assert f"{package}/py.typed" in names
        home = ROOT / room
        sources = (home / package).rglob("*.py")
        assert {path.relative_to(home).as_posix() for path in sources} <= names
    assert "ditq_converters/demo/assets/digits.safetensors" in names
    assert any(name.startswith("ditq_kernels/tuned/") for name in names)
    assert "ditq_bench/census/budget.json" in names
    metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist")]
    assert not any(
        "triton" in line and "extra" not in line for line in required
    )  # a CPU needs none


def test_a_newcomer_gets_from_the_sources_to_a_page():
    """The short form: an sdist, a wheel from it, an empty environment with it, first steps, a page in a browser."""
    newcomer = [sys.executable, ROOT / ".ci" / "newcomer", "--short"]
    done = subprocess.run(newcomer, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert steps == ["build", "install", "commands", "first_steps", "pages"], done.stdout
