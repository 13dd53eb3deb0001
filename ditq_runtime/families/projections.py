"""Linears that read one quantized input: one launch of all where they are of one kind, else one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import ditq_kernels as k
from ditq_runtime.families.fused import Step, packed_linear, product_steps
from ditq_runtime.layers.linear import QuantLinear
from ditq_runtime.layers.site import Codes


def in_one_launch(linears: Sequence[QuantLinear]) -> bool:
    """Whether one op multiplies all of them: one format and output dtype, no low-rank branch."""
    first, *others = linears
    shared, dtype = first.format, first.compute_dtype
    if shared.lora_rank or not others:
        return False
    for other in others:
        same = other.format is shared or other.format == shared
        if not same or other.compute_dtype is not dtype:
            return False
    return True


def products(linears: Sequence[QuantLinear], codes: Codes) -> Sequence[torch.Tensor]:
    """What each linear makes of the codes [T, K] of one input: [T, N_i] in its compute dtype."""
    if not in_one_launch(linears):
        return [linear.multiply(codes, linear.compute_dtype) for linear in linears]
    first = linears[0]
    options: dict[str, Any] = first.epilogue(codes)
    if options.pop("weight_sum", None) is not None:
        options["weight_sums"] = [linear._parameters["weight_sum"] for linear in linears]
    biases: Any = [one._parameters["bias"] for one in linears] if first.format.bias else None
    packed = [linear.packed() for linear in linears]
    return k.gemm_many(
        codes.q, packed, codes.scale, biases, out_dtype=first.compute_dtype, **options
    )


def projection_steps(block: nn.Module, names: Sequence[str]) -> list[Step]:
    """The ops of that, in order, for linears by their names."""
    if in_one_launch([packed_linear(block, name) for name in names]):
        return [("gemm_many", tuple(names))]
    return [step for name in names for step in product_steps(block, name)]
