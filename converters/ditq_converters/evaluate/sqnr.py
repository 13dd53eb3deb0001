"""Signal-to-quantization-noise ratio of the noise prediction, per sampling step (Meta, Eq. 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ditq_converters.calibrate.trajectory import Call, SamplingPlan, predict, trajectory


@dataclass(frozen=True)
class SqnrCurve:
    """SQNR in dB per call, noisiest first.

    Attributes:
        mean_of_ratios: 10 log10 mean_x(|f|^2 / |fq - f|^2), the convention of Meta's Eq. 3.
        ratio_of_sums: 10 log10(sum_x |f|^2 / sum_x |fq - f|^2); lower, and steadier.
    """

    mean_of_ratios: list[float]
    ratio_of_sums: list[float]

    @property
    def mean(self) -> float:
        """Mean over calls of `mean_of_ratios`, in dB."""
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
    power = signal.double().flatten(1).pow(2).sum(1)
    noise = (quantized.double() - signal.double()).flatten(1).pow(2).sum(1)
    if not bool(torch.isfinite(power).all() and torch.isfinite(noise).all()):
        raise ValueError("sqnr: a model gave values that are not finite; its SQNR is undefined")
    if not bool((noise > 0).all()):
        raise ValueError(
            "sqnr: a sample has no quantization noise at all; is the quantized model the float model?"
        )
    return 10 * float((power / noise).mean().log10()), 10 * float(
        (power.sum() / noise.sum()).log10()
    )


def run(
    model: nn.Module,
    scheduler: Any,
    plan: SamplingPlan,
    after_call: Callable[[], None] | None = None,
) -> list[Call]:
    """All calls of one sampling run; `[-1].after` are the samples [S, C, H, W]."""
    calls = []
    for call in trajectory(model, scheduler, plan):
        calls.append(call)
        if after_call is not None:
            after_call()
    return calls


def compare_runs(float_calls: list[Call], quantized_calls: list[Call]) -> SqnrCurve:
    """Free SQNR: each model on its own trajectory, from equal seeds."""
    pairs = [
        sqnr_db(f.epsilon, q.epsilon[: len(f.epsilon)])
        for f, q in zip(float_calls, quantized_calls, strict=True)
    ]
    return _curve(pairs)


@torch.no_grad()
def forced_sqnr(
    float_calls: list[Call],
    quantized: nn.Module,
    plan: SamplingPlan,
    after_call: Callable[[], None] | None = None,
) -> SqnrCurve:
    """Forced SQNR: the quantized model is given the float model's latents at every call."""
    pairs = []
    for call in float_calls:
        timestep = torch.tensor(call.timestep)
        pairs.append(sqnr_db(call.epsilon, predict(quantized, call.latents, timestep, plan)))
        if after_call is not None:
            after_call()
    return _curve(pairs)


@torch.no_grad()
def halves_sqnr(
    model: nn.Module,
    quantized: nn.Module,
    float_calls: list[Call],
    quantized_calls: list[Call],
    plan: SamplingPlan,
    after_call: Callable[[], None] | None = None,
) -> dict[str, dict[str, SqnrCurve]]:
    """SQNR of the two halves of guidance on their own, before they are combined.

    Args:
        model: float transformer.
        quantized: packed transformer.
        float_calls: of the float model's guided run.
        quantized_calls: of the packed model's, from equal noise.
        plan: the plan of both runs.
        after_call: told when a call of one half is done.

    Returns:
        {"cond" | "null": {"free" | "forced": curve}}.

    Raises:
        ValueError: the plan is not guided, so that there is no null half.
    """
    if not plan.guided:
        raise ValueError(
            f"halves: need guidance above 1, got {plan.guidance}; without it there is no null half"
        )
    nulls = (plan.null_label,) * len(plan.labels)
    plans = {"cond": plan.labels, "null": nulls}
    curves = {}
    for half, labels in plans.items():
        alone = replace(plan, labels=labels, guidance=1.0)
        free, forced = [], []
        for ours, theirs in zip(float_calls, quantized_calls, strict=True):
            timestep = torch.tensor(ours.timestep)
            truth = predict(model, ours.latents, timestep, alone)
            free.append(sqnr_db(truth, predict(quantized, theirs.latents, timestep, alone)))
            forced.append(sqnr_db(truth, predict(quantized, ours.latents, timestep, alone)))
            if after_call is not None:
                after_call()
        curves[half] = {"free": _curve(free), "forced": _curve(forced)}
    return curves


def subset(calls: list[Call], samples: int) -> list[Call]:
    """The first `samples` samples of a run."""
    return [
        Call(c.index, c.timestep, c.latents[:samples], c.epsilon[:samples], c.after[:samples])
        for c in calls
    ]


def _curve(pairs: list[tuple[float, float]]) -> SqnrCurve:
    return SqnrCurve(*(list(values) for values in zip(*pairs, strict=True)))
