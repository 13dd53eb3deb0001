"""An evaluation input by input: what one showed, as a file, so that processes share inputs and a killed run goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ditq_converters.calibrate.stats import model_hash
from ditq_converters.evaluate.clipping import ClipCounter
from ditq_converters.evaluate.inputs import Models
from ditq_converters.evaluate.layer_error import CASCADE, FORCED, Series, layer_series
from ditq_converters.evaluate.records import EvaluationSettings
from ditq_converters.evaluate.runs import Run, run
from ditq_converters.evaluate.sqnr import forced_powers, free_powers
from ditq_runtime.calls.inputs import Input
from ditq_runtime.calls.pipeline import with_transformers
from ditq_runtime.calls.sharing import once, same_work, take_turns, world
from ditq_runtime.files import atomic_file, check_new, write_json

FREE, REPLAYED, CLIP = "free", "forced", "clip"
LATENTS, IMAGES, SIDES = "latents", "images", ("float", "packed")
WORK, LOCKS, READ, REPORT = "work.json", "locks", "read", "report.json"


@dataclass(frozen=True)
class Part:
    """What one input showed.

    Attributes:
        series: free and forced powers per step (`sqnr`), errors of layers per call, cut-off inputs per call.
        names: of the layers of a series.
        drawn: `latents.float`, `latents.packed`, `images.float`, ...: [S, ...] fp32, as far as there are any.
    """

    series: dict[str, Series]
    names: dict[str, list[str]]
    drawn: dict[str, torch.Tensor]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        with atomic_file(path) as part:
            torch.save(vars(self), part)

    @classmethod
    def load(cls, path: Path) -> Part:
        """Read it back, to the bit."""
        return cls(**torch.load(path, weights_only=True))


@dataclass(frozen=True)
class Task:
    """What there is to measure.

    Attributes:
        packed: component -> packed transformer.
        models: component -> float transformer.
        pipe: whose scheduler and VAE to use.
        given: all inputs.
        settings: how much of everything.
        tick: told when an input is done.
        drawn: number of an input -> what the float model did with it, kept for the next packed model; None: not kept.
    """

    packed: Models
    models: Models
    pipe: Any
    given: Sequence[Input]
    settings: EvaluationSettings
    tick: Callable[[], None]
    drawn: dict[int, Run] | None = None

    def is_few(self, index: int) -> bool:
        """Whether the calls of an input are compared too."""
        before = sum(one.samples for one in self.given[:index])
        return before < self.settings.few_samples

    def measure(self, index: int) -> Part:
        """Draw one input with both, and compare."""
        one, few, sampler = [self.given[index]], self.is_few(index), self.settings.sampler or ""
        how: dict[str, Any] = {"sampler": sampler, "decode": True}
        kept = {} if self.drawn is None else self.drawn
        if index not in kept:
            kept[index] = run(with_transformers(self.pipe, self.models), one, few=int(few), **how)
        ours = kept[index]
        with ClipCounter(self.packed) as counter:
            theirs = run(with_transformers(self.pipe, self.packed), one, **how)
        series: dict[str, Series] = {FREE: free_powers(ours.steps[0], theirs.steps[0])}
        series[CLIP] = [(t, (counts,)) for t, counts in counter.counted]
        names = {CLIP: counter.names}
        if few:
            calls = [one for one in ours.calls[0] if one.call.component in self.packed]
            series[REPLAYED] = forced_powers(calls, self.packed)
            for mode in (CASCADE, FORCED):
                names[mode], series[mode] = layer_series(mode, self.models, self.packed, calls)
        self.tick()
        return Part(series, names, _drawn(ours, theirs))

    def work(self) -> dict[str, Any]:
        """What its parts depend on."""
        hashes = {
            side: {name: model_hash(model) for name, model in models.items()}
            for side, models in (("models", self.models), ("packed models", self.packed))
        }
        inputs = [one.digest for one in self.given]
        return {"inputs": inputs, "settings": asdict(self.settings), **hashes}


def _drawn(ours: Run, theirs: Run) -> dict[str, torch.Tensor]:
    """What both have."""
    found = {
        f"{what}.{side}": getattr(made, what)
        for what in (LATENTS, IMAGES)
        for side, made in zip(SIDES, (ours, theirs), strict=True)
    }
    return {
        name: tensor
        for name, tensor in found.items()
        if all(found[f"{name.partition('.')[0]}.{side}"] is not None for side in SIDES)
    }


def folder_of(out: Path) -> Path:
    """Where the parts of an unfinished report are."""
    return out.with_name(f".{out.name}.inputs")


def check_out(out: Path) -> None:
    """That a report can appear at `out`; one that another process has just written is no obstacle."""
    if not folder_of(out).exists():
        check_new(out)


def parts_of(task: Task, out: Path | None) -> list[Part]:
    """All parts, in the order of the inputs; through files where there is an `out`.

    Raises:
        ValueError: processes that share `out` measure different things.
    """
    total = range(len(task.given))
    if out is None:
        return [task.measure(index) for index in total]
    folder, work = folder_of(out), task.work()
    try:
        same_work(folder / WORK, work, "figures")
    except ValueError:
        if world() > 1:
            raise
        shutil.rmtree(folder)  # of an earlier run with other settings
        write_json(folder / WORK, work)
    files = [folder / f"{index:04d}.pt" for index in total]
    take_turns(
        len(files),
        folder / LOCKS,
        lambda index: files[index].exists(),
        lambda index: task.measure(index).save(files[index]),
    )
    return [Part.load(file) for file in files]


def write_once(out: Path, write: Callable[[], None]) -> None:
    """Write the report in one of the processes, and remove the parts when all have read them."""
    folder = folder_of(out)
    once(folder / LOCKS / "report", (out / REPORT).exists, write)
    rank = os.environ.get("RANK", "0")
    (folder / f"{READ}.{rank}").touch()
    if len(list(folder.glob(f"{READ}.*"))) >= world():
        shutil.rmtree(folder, ignore_errors=True)
