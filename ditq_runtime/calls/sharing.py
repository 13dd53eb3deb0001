"""Processes that share a list of inputs through a folder alone: locks on what is being made, files of what is done."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ditq_runtime.files import write_json

PAUSE = 0.1  # seconds between two looks at what other processes do


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Hold a lock for the block where nobody else has it; True if it is ours. The kernel frees it after a crash."""
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        path.unlink(missing_ok=True)


def _opened(path: Path) -> Any:
    """The file of a lock; its folder goes when nobody needs it any more, perhaps between two lines here."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.open("w", encoding="utf-8")


def tidy(locks: Path) -> None:
    """Remove a folder of locks, with those that killed processes left there; what somebody holds stays."""
    for path in locks.glob("*"):
        with claim(path):
            pass  # ours: it goes at the end of this block
    with suppress(OSError):
        locks.rmdir()


def take_turns(
    total: int, locks: Path, done: Callable[[int], bool], make: Callable[[int], None]
) -> None:
    """Make what is not there: first this process' share (RANK and WORLD_SIZE), then what nobody works on.

    Returns when all of it is there, whoever made it.

    Args:
        total: how many inputs.
        locks: folder for a lock on each.
        done: whether number i is there.
        make: makes number i.
    """
    while todo := [index for index in _own_first(total) if not done(index)]:
        if not any([_make(locks, done, make, index) for index in todo]):
            time.sleep(PAUSE)  # others are at all of them
    tidy(locks)


def once(lock: Path, done: Callable[[], bool], make: Callable[[], None]) -> None:
    """Make what all processes wait for, in one of them."""
    while not done():
        with claim(lock) as ours:
            if ours and not done():
                make()
        if not ours:
            time.sleep(PAUSE)


def same_work(file: Path, work: dict[str, Any], what: str) -> None:
    """Write down what a folder is for, or check it; more inputs at the end are allowed.

    Args:
        file: of the folder.
        work: JSON-safe; `inputs` is a list of digests.
        what: the folder holds, for the refusal.

    Raises:
        ValueError: it holds what was made of other inputs or by other means.
    """
    folder, before = file.parent, None
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        for key, now in work.items():
            then = before.get(key)
            if then != now and not (key == "inputs" and then == now[: len(then)]):
                raise ValueError(
                    f"{folder}: holds {what} of other {key}; name a new folder, or the same arguments to go on"
                )
    if before != work:
        write_json(file, work)


def world() -> int:
    """How many processes torchrun or accelerate started; 1 where neither did."""
    return max(int(os.environ.get("WORLD_SIZE", 1)), 1)


def _own_first(total: int) -> list[int]:
    rank = int(os.environ.get("RANK", 0))
    return sorted(range(total), key=lambda index: (index % world() != rank, index))


def _make(
    locks: Path, done: Callable[[int], bool], make: Callable[[int], None], index: int
) -> bool:
    """One of them, unless somebody else makes or has made it; True if it was made here."""
    with claim(locks / f"{index:04d}") as ours:
        if not ours or done(index):
            return False
        make(index)
    return True
