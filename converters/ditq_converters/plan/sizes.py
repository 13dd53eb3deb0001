"""Bytes of what is planned, before anything is converted."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from torch import nn

from ditq_converters.plan.entries import QUANTIZED, LinearPlan
from ditq_converters.plan.plan import Plan
from ditq_runtime.format.layer import GROUPED


def linear_bytes(entry: LinearPlan, bias: bool) -> int:
    """Bytes that a planned linear stores, without what its site does."""
    layer_format = entry.layer_format(bias)
    assert layer_format is not None
    outputs, inputs = entry.shape
    stored = layer_format.tensors(inputs, outputs).values()
    return sum(dtype.itemsize * prod(shape) for dtype, shape in stored)


def larger_than_eight_bits(plan: Plan, model: nn.Module) -> str | None:
    """A sentence where a plan in 4 bits makes a larger file than the same in 8 bits, without branches, would be.

    Args:
        plan: of the model.
        model: the float model; only which linears have a bias is read.
    """
    entries = [entry for entry in plan.linears if entry.weights in QUANTIZED]
    if not any(entry.weights in GROUPED for entry in entries):
        return None
    biased = {
        e.name: getattr(model.get_submodule(e.name), "bias", None) is not None for e in entries
    }
    eight: dict[str, Any] = {"weights": "w8", "group_size": None, "symmetric": False, "rank": 0}
    ours = sum(linear_bytes(entry, biased[entry.name]) for entry in entries)
    plain = sum(linear_bytes(replace(entry, **eight), biased[entry.name]) for entry in entries)
    if ours <= plain:
        return None
    ranks = sorted({entry.rank for entry in entries if entry.rank})
    return (
        f"the linears in 4 bits take {ours:,} bytes with their branches of rank {', '.join(map(str, ranks))}, more "
        f"than the {plain:,} that 8 bits without take; lower --lora-rank, or take --weights w8"
    )
