"""Two processes convert to one OUT at a random distance: one OUT comes out, whole, and who did not write it says so."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ditq_bench.stress.outcome import Tally

CHOICES = ("w8", "w4g")  # the two write different bytes
PATIENCE = 300.0


def attack(folder: Path, pairs: int, seed: int) -> list[Tally]:
    """Let pairs of processes write.

    Args:
        folder: an empty one.
        pairs: how many.
        seed: of the distances.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ditq_converters", "ditq_converters.demo.pipeline"])
    tally, rng = Tally("two writers", seed), random.Random(seed)
    whole = {}
    for choice in CHOICES:
        ours, process = _start(context, choice, folder / choice, 0.0)
        assert ours.recv() is None
        process.join()
        whole[choice] = _contents(folder / choice)
    for number in range(pairs):
        out = folder / f"pair_{number}"
        delays = (0.0, rng.uniform(0, 1.5)) if rng.random() < 0.7 else (0.0, 0.0)
        begun = [_start(context, c, out, d) for c, d in zip(CHOICES, delays, strict=True)]
        ends: list[Any] = []
        for ours, process in begun:
            ends.append(ours.recv() if ours.poll(PATIENCE) else "it hangs")
            process.kill()
            process.join()
        _judge(tally, number, ends, _contents(out), whole)
    return [tally]


def _judge(
    tally: Tally, number: int, ends: list[Any], found: dict[str, bytes], whole: dict[str, Any]
) -> None:
    """One of the two wrote all of it; the other said that it could not."""
    winners = [choice for choice, end in zip(CHOICES, ends, strict=True) if end is None]
    right = len(winners) == 1 and found == whole[winners[0]]
    told = [end for end in ends if end is not None]
    named = all("another process is writing" in end or "already exists" in end for end in told)
    tally.add(number, f"ends {ends}", None, right and named)


def _start(context: Any, choice: str, out: Path, delay: float) -> tuple[Connection, Any]:
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(choice, str(out), delay, theirs))
    process.start()
    return ours, process


def work(choice: str, out: str, delay: float, told: Connection) -> None:
    """Convert in a process of its own; tell None, or the sentence that it ended with."""
    import torch

    from ditq_converters import Recipe, convert, open_model

    torch.set_num_threads(1)
    pipe = open_model("demo:digits")
    time.sleep(delay)
    try:
        convert(pipe, Recipe("linear", choice), out=out, quiet=True)
    except (ValueError, OSError) as error:
        told.send(f"{type(error).__name__}: {error}")
    else:
        told.send(None)


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
