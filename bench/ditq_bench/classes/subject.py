"""One class ready to be swept: its model, what calls it, and the calls that conversions are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq_bench.zoo import Tiny, outputs, quiet
from ditq_bench.zoo.pipelines import MAIN
from ditq_converters.calibrate.run import calibrate
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.sites.find import Discovery, discover, remember
from ditq_converters.sites.first_call import first_call
from ditq_runtime.families import FAMILIES

SHARES = (1.0, 0.75, 0.5, 0.25)  # of the largest timestep, as a sampler falls
STEPS = "num_inference_steps"
ROWS = 8  # kept per site and timestep
Calls = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """One class.

    Attributes:
        model: the float transformer.
        found: its sites.
        stats: of it.
        calls: keyword arguments of two forwards, at the first timestep and at the last.
        calibrated: what called it.
    """

    model: nn.Module
    found: Discovery
    stats: CalibrationStats
    calls: Calls
    calibrated: str


def make(tiny: Tiny, folder: Path) -> Subject:
    """Build a class, find its sites, and calibrate it into a folder: through its tiny pipeline where there is one."""
    with quiet():
        return _by_pipeline(tiny, folder) if tiny.pipeline else _alone(tiny, folder)


def _by_pipeline(tiny: Tiny, folder: Path) -> Subject:
    assert tiny.pipeline is not None
    pipe = tiny.pipeline()
    calls = [{**c, STEPS: len(SHARES)} if STEPS in c else dict(c) for c in tiny.calls]
    model = pipe.transformer
    found = _found(model, first_call(model, lambda: pipe(**calls[0])))
    stats = calibrate(pipe, folder, calls, rows=ROWS * len(SHARES), quiet=True)
    return Subject(model, found, stats, judged(stats, tiny, model), MAIN[tiny.name])


def _alone(tiny: Tiny, folder: Path) -> Subject:
    model = tiny.build()
    inputs = tiny.inputs(model)
    found = _found(model, inputs)
    names = (tiny.timestep,) if isinstance(tiny.timestep, str) else tiny.timestep or ()

    def run(model: nn.Module) -> None:
        for share in SHARES:
            times = {name: (inputs[name] * share).to(inputs[name].dtype) for name in names}
            model(**{**inputs, **times})

    stats = observe(model, folder, run, attention=False)
    return Subject(model, found, stats, judged(stats, tiny, model), "an own loop")


def observe(
    model: nn.Module, folder: Path, run: Callable[[nn.Module], None], attention: bool = False
) -> CalibrationStats:
    """Statistics of an own loop."""
    rows = ROWS * len(SHARES)
    return calibrate(model, folder, run=run, rows=rows, attention=attention, quiet=True)


def _found(model: nn.Module, inputs: dict[str, Any]) -> Discovery:
    found = discover(model, inputs)
    if found.family.architecture not in FAMILIES:
        remember(model, found.family)
    return found


def judged(stats: CalibrationStats, tiny: Tiny, model: nn.Module) -> Calls:
    """The first and the last of the calls that were kept whole; the zoo's own arguments where none could be."""
    kept = list(stats.replay())
    if not kept:
        return [tiny.inputs(model)]
    return [call.by_name(model) for call in (kept[0], kept[-1])]


def run_all(model: nn.Module, calls: Calls) -> list[torch.Tensor]:
    """Every tensor that the forwards return."""
    return [tensor for call in calls for tensor in outputs(model, call)]
