"""Kill stress: SIGKILL `calibrate` and `convert` at random moments, run them again, compare every byte.

Half of the kills go to each job, on demo:digits with few steps; of these every other to the time when it writes. A run
that was killed and repeated must leave the files of one that was not: the same names, the same bytes, and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ditq_converters.calibrate.share import LOG
from ditq_runtime.files import write_json

MODEL = "demo:digits"
STEPS, SAMPLES = 6, 4
PATIENCE = 300.0  # seconds until a run that does not start or end counts as hanging
JOBS = ("calibrate", "convert")
PRELOADED = (  # what a job imports on first use
    "ditq_converters",
    "ditq_converters.demo.pipeline",
    "diffusers.pipelines.dit.pipeline_dit",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
)


@dataclass(frozen=True)
class Outcome:
    """What the kills of one job led to.

    Attributes:
        job: one of JOBS.
        seconds: the uninterrupted run.
        kills: SIGKILLs sent, at moments uniform over that time, or over the time since the first output.
        alive: those that met a running process.
        partial: those that left unfinished output on disk.
        identical: runs that ended, after the kill and a repetition, with the very files of the uninterrupted run.
        leftovers: names of files that only a killed run's folder held in the end.
    """

    job: str
    seconds: float
    kills: int
    alive: int
    partial: int
    identical: int
    leftovers: tuple[str, ...]


def stress(kills: int, out: Path, seed: int = 0) -> list[Outcome]:
    """Send `kills` SIGKILLs, half to each job.

    Args:
        kills: at least 2.
        out: folder for the runs, emptied first; what did not come out identical stays there.
        seed: of the moments.

    Raises:
        ValueError: fewer than two kills, or `out` holds something that is not a stress run.
        RuntimeError: a run failed by itself.
    """
    if kills < 2:
        raise ValueError(f"stress: kills must be at least 2, one for each job, got {kills}")
    _empty(out)
    runner = Runner()
    rng = random.Random(seed)
    shares = (kills - kills // 2, kills // 2)
    outcomes = [_stress_job(runner, job, n, out, rng) for job, n in zip(JOBS, shares, strict=True)]
    write_json(out / "stress.json", {"seed": seed, "jobs": [asdict(o) for o in outcomes]})
    return outcomes


@dataclass(frozen=True)
class Run:
    """One run of a job.

    Attributes:
        seconds: that its work took.
        writing: seconds since its first output.
        killed: SIGKILL ended it.
    """

    seconds: float
    writing: float
    killed: bool


class Runner:
    """Starts jobs as forks of a server that has imported everything once."""

    def __init__(self) -> None:
        """Nothing is started yet."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))

    def run(self, job: str, out: Path, kill_after: float | None = None, wait: bool = False) -> Run:
        """Run a job to its end, or kill it.

        Args:
            job: one of JOBS.
            out: folder that it writes, in a folder of its own.
            kill_after: seconds after its work began, or None.
            wait: count them from its first output instead.
        """
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(job, str(out), theirs))
        process.start()
        try:
            if not ours.poll(PATIENCE):
                raise RuntimeError(f"stress: {job} did not start in {PATIENCE:.0f} s")
            ours.recv()
            begin = first = time.monotonic()
            if wait or kill_after is None:
                first = _first_output(process, out.parent)
            process.join(PATIENCE if kill_after is None else kill_after)
        finally:
            process.kill()  # nothing happens to one that has ended
            process.join()
        end, killed = time.monotonic(), process.exitcode == -signal.SIGKILL
        if process.exitcode != (-signal.SIGKILL if killed and kill_after is not None else 0):
            raise RuntimeError(
                f"stress: {job} into {out} ended with {process.exitcode}; see its traceback"
            )
        return Run(end - begin, end - first, killed)


def _first_output(process: Any, folder: Path) -> float:
    """Wait until something is in a folder, or a process has ended; return the moment."""
    # os.walk, unlike rglob, passes over a folder that vanishes meanwhile
    while process.is_alive() and not any(files for _, _, files in os.walk(folder)):
        time.sleep(0.002)
    return time.monotonic()


def work(job: str, out: str, started: Connection) -> None:
    """One job in a process of its own; says when its model is open."""
    import torch

    from ditq_converters import CalibrationStats, Recipe, calibrate, convert, open_model

    torch.set_num_threads(1)
    pipe, folder = open_model(MODEL), Path(out)
    if job == "calibrate":
        started.send(None)
        how: dict[str, Any] = {
            "steps": STEPS,
            "samples": SAMPLES,
            "batch": 1,
            "sampler": "dpmsolver++",
        }
        calibrate(pipe, folder, **how, quiet=True)
        return
    stats = CalibrationStats.open(_reference(folder.parent.parent, "calibrate"))
    started.send(None)
    convert(pipe, Recipe(weights="w4p"), stats, folder, quiet=True)


def _stress_job(runner: Runner, job: str, kills: int, out: Path, rng: random.Random) -> Outcome:
    whole = _reference(out, job)
    uninterrupted = runner.run(job, whole)
    expected = contents(whole.parent)
    alive = partial = identical = 0
    leftovers: set[str] = set()
    for number in range(kills):
        folder = out / f"{job}_{number:03d}" / whole.name
        late = number % 2 == 1
        window = uninterrupted.writing if late else uninterrupted.seconds
        alive += runner.run(job, folder, rng.uniform(0, window), late).killed
        after_kill = contents(folder.parent)
        partial += bool(after_kill) and after_kill != expected
        if job == "calibrate" or not folder.exists():  # convert refuses a folder that is complete
            runner.run(job, folder)
        found = contents(folder.parent)
        leftovers |= found.keys() - expected.keys()
        if found == expected:
            identical += 1
            shutil.rmtree(folder.parent)
    return Outcome(
        job, uninterrupted.seconds, kills, alive, partial, identical, tuple(sorted(leftovers))
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of every file below a folder, hidden ones included; a log, which has times in it, left out."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOG)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _reference(out: Path, job: str) -> Path:
    return out / f"{job}_whole" / "out"


def _empty(out: Path) -> None:
    ours = {"stress.json", *(path.name for job in JOBS for path in out.glob(f"{job}_*"))}
    for path in out.iterdir() if out.exists() else ():
        if path.name not in ours:
            raise ValueError(
                f"{out}: holds {path.name}, which no stress run made; use a new folder"
            )
    shutil.rmtree(out, ignore_errors=True)
