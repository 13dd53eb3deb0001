"""Output that appears whole or not at all: write beside the target, flush, rename."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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
    removes such leftovers, so one target belongs to one process at a time: `one_writer` sees to it.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        ValueError: no folder can appear there (`check_new`), or another process is writing it.
    """
    check_new(path)
    with one_writer(path), _part_folder(path) as part:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes files that only their owner can read
                _flush(file)
        part.chmod(0o755)
        check_new(path)  # somebody may have put something there meanwhile
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


@contextmanager
def one_writer(path: Path | None, again: bool = False) -> Iterator[None]:
    """Be the only one that writes `path`, from the begin of the work on; what killed processes left of it is removed.

    The lock is the file `.NAME.lock` beside it, held by the operating system: a crash releases it, and the next writer
    takes the file over.

    Args:
        path: None: nothing is written.
        again: in here this thread may enter once more, to write at the end what it worked on.

    Raises:
        ValueError: another process or thread holds it.
    """
    mine = (path and path.absolute(), threading.get_ident())
    if path is None:
        yield
        return
    if mine in _HELD:
        if not again:
            _HELD.discard(mine)
        try:
            yield
        finally:
            _HELD.add(mine)
        return
    with _parents(path):
        handle = _locked(path)
        if again:
            _HELD.add(mine)
        try:
            remove_leftovers(path.parent, glob.escape(path.name))
            yield
        finally:
            _HELD.discard(mine)
            if handle is not None:
                _lock_of(path).unlink(missing_ok=True)
                os.close(handle)


_HELD: set[tuple[Path | None, int]] = set()  # paths, and the threads that may enter again


def remove_locks(folder: Path) -> None:
    """Remove the locks that killed processes left in a folder; those that somebody holds stay."""
    for lock in folder.glob(".*.lock"):
        with suppress(ValueError), one_writer(folder / lock.name[1 : -len(".lock")]):
            pass  # it goes at the end of this block


def _lock_of(path: Path) -> Path:
    return path.parent / f".{path.name}.lock"


def _locked(path: Path) -> int | None:
    """The lock of a path, open and ours; None on systems without such locks."""
    if fcntl is None:
        return None
    lock = _lock_of(path)
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(
                f"{path}: another process is writing it; wait for that one, or choose another output folder"
            ) from None
        if _is_at(handle, lock):  # else its last holder removed the file while we opened it
            return handle
        os.close(handle)


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """The folders above a path; those that were made go again where nothing came into them."""
    new = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def check_new(path: Path) -> None:
    """That a folder can appear at `path`; before work begins.

    Raises:
        FileExistsError: it exists and is not an empty folder.
        ValueError: nothing can be renamed to it, or nothing written beside it; says why.
    """
    _check_rename(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} already exists; choose another output folder or remove it first"
        )


def check_ours(path: Path, mark: str) -> None:
    """That a folder is new, empty, or one that an earlier run of the same work marked; before work begins.

    Args:
        path: of the folder.
        mark: the file that such a run leaves there first.

    Raises:
        ValueError: it holds something else, is a file, or nothing can be written there; says what.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; name a folder")
    check_place(path)
    held = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if held and mark not in held:
        raise ValueError(f"{path}: holds something else ({', '.join(held[:3])}); name a new folder")


def check_file(path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """That a file can be written to `path`; before work begins.

    Args:
        path: it may exist, and is replaced then.
        suffixes: of what will be in it, such as `.png`; empty: any.

    Raises:
        ValueError: a folder is there, nothing can be written beside it, or its name promises something else.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{path}: its name must end in {' or '.join(suffixes)}, which is what it will hold"
        )
    check_place(path)


def check_place(path: Path) -> None:
    """That something can be written at `path`, or in it where it is a folder; before work begins.

    Raises:
        ValueError: it is the root, part of the path is a file, or the file system lets nobody write; says which.
    """
    if not path.absolute().name:
        raise ValueError(f"{path}: is the root of the file system; name something in it")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{path}: {above} is a file; choose another place")
    for folder in (above, path) if path.is_dir() else (above,):
        try:
            os.rmdir(tempfile.mkdtemp(dir=folder, prefix=".ditq."))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ValueError(
                f"{path}: nothing can be written in {folder} ({reason}); choose another place"
            ) from error


def _check_rename(path: Path) -> None:
    """ValueError unless a folder beside `path` can be renamed to it."""
    if path.is_symlink():
        raise ValueError(f"{path}: is a symbolic link, which would be replaced; name its target")
    here = Path.cwd()
    if path.exists() and (path.resolve() == here or path.resolve() in here.parents):
        raise ValueError(f"{path}: is the current folder or one above it; name a new one inside")
    if path.is_mount():
        raise ValueError(f"{path}: is a mount point, which cannot be replaced; name a folder in it")
    check_place(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, with sorted keys and a final newline."""
    with atomic_file(path) as part:
        part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
