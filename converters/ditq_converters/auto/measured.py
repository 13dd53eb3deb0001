"""A model as it would be packed, in the place of the float one, and how far its outputs are off on replayed calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import torch
from torch import nn

from ditq_converters.auto.budget import file_bytes
from ditq_converters.calibrate.stats import CalibrationStats
from ditq_converters.convert.jobs import Job
from ditq_converters.convert.pack import packed_skeleton
from ditq_converters.convert.prefix import Prefix
from ditq_converters.convert.story import convert_parts
from ditq_converters.memory import SLACK, format_bytes, held
from ditq_converters.plan.entries import QUANTIZED, LinearPlan
from ditq_converters.plan.plan import Plan
from ditq_converters.plan.sizes import linear_bytes
from ditq_converters.streaming.model import largest_block, streamed_of
from ditq_converters.streaming.write import WORK
from ditq_runtime.families import Family
from ditq_runtime.format.layer import LayerFormat

CALLS = 8  # replayed calls that judge, evenly over those that were kept


def noise(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Mean over calls of |found - wanted|^2 / |wanted|^2; those that are 0 all over count by what is found."""
    shares = [
        float((b.double() - a.double()).square().sum() / (a.double().square().sum() or 1.0))
        for a, b in zip(wanted, found, strict=True)
    ]
    return sum(shares) / len(shares)


def emulated(
    model: nn.Module, family: Family, plan: Plan, stats: CalibrationStats
) -> tuple[Prefix, int]:
    """A copy that computes as the plan's checkpoint will, rounded without aiming; and the checkpoint's bytes."""
    linears = (
        replace(entry, rounding="gptq") if entry.rounding == "aimed" else entry
        for entry in plan.linears
    )
    plain = replace(plan, linears=tuple(linears))
    kept = list(stats.replay())
    prefix = Prefix(model, islice(kept, 0, None, max(1, len(kept) // CALLS)))
    job = Job(model, model, family, plain, stats, True, prefix)
    formats: dict[str, LayerFormat] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in convert_parts(job, None):
        formats |= part.formats
        shapes |= {name: tuple(tensor.shape) for name, tensor in part.tensors.items()}
    scheme = job.scheme(formats, shapes)
    return prefix, file_bytes(packed_skeleton(model, scheme, job.provenance, plan.kept_dtype))


def check_room(model: nn.Module, family: Family, low: Plan, better: list[Plan]) -> None:
    """ValueError if a model whose weights are on disk does not fit into its budget twice, in 4 and in 8 bits."""
    streamed = streamed_of(model)
    if streamed is None or streamed.memory_budget is None:
        return
    smallest, *sizes = (bytes_of(model, plan.linears) for plan in (low, *better))
    block = WORK * largest_block(model, family)
    needed = held(torch.device("cpu")) + SLACK + smallest + max(sizes) + block
    if needed > streamed.memory_budget:
        raise ValueError(
            f"auto: a search for a --budget holds the model in 4 and in 8 bits and a block in fp32, which needs "
            f"{format_bytes(needed)} and may take {format_bytes(streamed.memory_budget)}; allow more, or take --budget "
            "smallest or largest"
        )


def bytes_of(model: nn.Module, linears: Iterable[LinearPlan]) -> int:
    """Bytes that the quantized ones of some linears store."""
    return sum(
        linear_bytes(entry, getattr(model.get_submodule(entry.name), "bias", None) is not None)
        for entry in linears
        if entry.weights in QUANTIZED
    )
