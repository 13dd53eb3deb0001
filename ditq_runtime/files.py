"""Output that appears whole or not at all: write beside the target, flush, rename."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RANDOM = "?" * 8  # the part of a temporary name that `tempfile` makes up


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path; rename it over `path` when the block succeeds, remove it when not.

    It lies in a hidden folder beside `path`, `.NAME.RANDOM.part`, so that whatever a writer keeps next to its file
    (safetensors has a temporary file of its own) goes with it. A killed process leaves that folder; `remove_leftovers`
    removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _part_folder(path) as folder:
        part = folder / path.name
        part.touch()
        yield part
        part.chmod(0o644)
        _flush(part)
        os.replace(part, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; rename it to `path` when the block succeeds, remove it when not.

    A killed process leaves a hidden `.NAME.RANDOM.part` folder and no `path`; the next run with the same target
    removes such leftovers, so one target belongs to one process at a time.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, glob.escape(path.name))
    with _part_folder(path) as part:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes files that only their owner can read
                _flush(file)
        part.chmod(0o755)
        if path.exists():
            path.rmdir()
        os.rename(part, path)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of writing `name`, a glob pattern, in a folder."""
    for leftover in folder.glob(f".{name}.{RANDOM}.part"):
        shutil.rmtree(leftover)


@contextmanager
def _part_folder(path: Path) -> Iterator[Path]:
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_new(path: Path) -> None:
    """FileExistsError if `path` exists and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} already exists; choose another output folder or remove it first"
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, with sorted keys and a final newline."""
    with atomic_file(path) as part:
        part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
