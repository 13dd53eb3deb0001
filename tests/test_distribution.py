"""The wheel: what is in it, and that its command and its packages work from a folder with a space and an umlaut."""

import os
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


def test_it_works_where_it_is_unpacked(wheel, tmp_path):
    place = tmp_path / "ein Ordner für alles"
    zipfile.ZipFile(wheel).extractall(place)
    environment = {**os.environ, "PYTHONPATH": str(place)}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-P", *arguments], cwd=tmp_path, env=environment, text=True,
            capture_output=True, check=False,
        )  # fmt: skip

    program = (
        "import ditq_runtime, ditq_converters, ditq_kernels\n"
        f"assert ditq_runtime.__file__.startswith({str(place)!r})\n"
        "from ditq_converters import open_model\n"
        "print(type(open_model('demo:digits').transformer).__name__)\n"
    )
    done = run("-c", program)
    assert done.stdout == "DiTTransformer2DModel\n", done.stderr
    done = run("-m", "ditq_runtime", "--help")
    assert done.returncode == 0, done.stderr
    assert "calibrate" in done.stdout
