"""Signal-to-quantization-noise ratio of the noise prediction, per sampling step (Meta, Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.schedule import schedule_of
from ditq_converters.evaluate.runs import Recorded, Run
from ditq_runtime.calls.pipeline import SchedulerStep

Powers = tuple[torch.Tensor, ...]  # [S] fp64 each: of the signal, of the noise
Steps = list[tuple[float, Powers]]  # timestep, powers


@dataclass(frozen=True)
class SqnrCurve:
    """SQNR in dB per timestep, noisiest first.

    Attributes:
        mean_of_ratios: 10 log10 mean_x(|f|^2 / |fq - f|^2), the convention of Meta's Eq. 3.
        ratio_of_sums: 10 log10(sum_x |f|^2 / sum_x |fq - f|^2); lower, and steadier.
        timesteps: of the scheduler, or what the transformer was told where it ran alone.
    """

    mean_of_ratios: list[float]
    ratio_of_sums: list[float]
    timesteps: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Mean over timesteps of `mean_of_ratios`, in dB."""
        return sum(self.mean_of_ratios) / len(self.mean_of_ratios)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "mean_db": self.mean,
            "mean_of_ratios_db": self.mean_of_ratios,
            "ratio_of_sums_db": self.ratio_of_sums,
        }


def sqnr_db(signal: torch.Tensor, quantized: torch.Tensor) -> tuple[float, float]:
    """Both conventions for one call.

    Args:
        signal: [S, ...] the float model's output.
        quantized: [S, ...] the quantized model's.

    Returns:
        (mean of ratios, ratio of sums) in dB.

    Raises:
        ValueError: the outputs are equal, bit for bit, so that there is no noise to measure.
    """
    return _db([_powers(signal, quantized)])


def _powers(signal: torch.Tensor, quantized: torch.Tensor) -> Powers:
    power = signal.double().flatten(1).pow(2).sum(1)
    return power, (quantized.double() - signal.double()).flatten(1).pow(2).sum(1)


def _db(parts: Sequence[Powers]) -> tuple[float, float]:
    power, noise = (torch.cat(side) for side in zip(*parts, strict=True))
    if not bool(torch.isfinite(power).all() and torch.isfinite(noise).all()):
        raise ValueError("sqnr: a model gave values that are not finite; its SQNR is undefined")
    if not bool((noise > 0).all()):
        raise ValueError(
            "sqnr: a sample has no quantization noise at all; is the quantized model the float model?"
        )
    return 10 * float((power / noise).mean().log10()), 10 * float(
        (power.sum() / noise.sum()).log10()
    )


def compare_runs(ours: Run, theirs: Run) -> SqnrCurve:
    """Free SQNR: each model on its own trajectory, from equal noise; of the prediction that the scheduler is given.

    Where inputs have different schedules, neighbours in noise are taken together (`schedule_of`).
    """
    pairs = zip(ours.steps, theirs.steps, strict=True)
    return curve([free_powers(float_steps, steps) for float_steps, steps in pairs])


def forced_sqnr(
    calls: Sequence[Sequence[Recorded]],
    quantized: Mapping[str, nn.Module],
    after_call: Callable[[], None] | None = None,
) -> SqnrCurve:
    """Forced SQNR: the quantized model makes the calls that the float model made; of its output, before guidance.

    Args:
        calls: of the float pipeline's run, input by input.
        quantized: component -> packed transformer.
        after_call: told when a call is done.
    """
    return curve([forced_powers(recorded, quantized, after_call) for recorded in calls])


def free_powers(ours: Sequence[SchedulerStep], theirs: Sequence[SchedulerStep]) -> Steps:
    """(timestep, powers) of every step of one input."""
    return [
        (f.timestep, _powers(f.prediction, q.prediction)) for f, q in zip(ours, theirs, strict=True)
    ]


@torch.no_grad()
def forced_powers(
    recorded: Sequence[Recorded],
    quantized: Mapping[str, nn.Module],
    after_call: Callable[[], None] | None = None,
) -> Steps:
    """(timestep, powers) of every call of one input; see `forced_sqnr`."""
    made = []
    for one in recorded:
        output = one.call.replay(quantized[one.call.component]).float().cpu()
        made.append((one.call.timestep, _powers(one.output, output)))
        if after_call is not None:
            after_call()
    return made


def curve(runs: Sequence[Steps]) -> SqnrCurve:
    """The curve of all inputs, in their order."""
    schedule = schedule_of([[timestep for timestep, _ in run] for run in runs])
    bins: list[list[Powers]] = [[] for _ in schedule.timesteps]
    for run in runs:
        for timestep, powers in run:
            bins[schedule.bin_of[timestep]].append(powers)
    means, sums = zip(*(_db(part) for part in bins), strict=True)
    return SqnrCurve(list(means), list(sums), schedule.timesteps)
