"""How much of a model a plan covers: share of FLOPs in integers, and bytes before and after. Nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ditq_converters.plan.plan import Plan
from ditq_runtime.families import Family, get_linear
from ditq_runtime.format.layer import LayerFormat

FLOAT_BYTES = 2  # bf16, what large models are published and run in
FLUX_SIDE = 32  # 512 pixels; Flux's configuration names no size
TOKENS = {  # as many as pipelines pad a prompt to, where the example has fewer
    "PixArtTransformer2DModel": {"encoder_hidden_states": 300},
    "SD3Transformer2DModel": {"encoder_hidden_states": 333},
    "FluxTransformer2DModel": {
        "encoder_hidden_states": 512,
        "txt_ids": 512,
        "hidden_states": FLUX_SIDE**2,
        "img_ids": FLUX_SIDE**2,
    },
}


@dataclass(frozen=True)
class Coverage:
    """Of one image at the size that the configuration names; Flux, which names none, at 512 pixels.

    Attributes:
        flops: linear name -> 2 * rows * K * N of one forward; None for a class that ditq cannot call.
        integer_flops_share: share of them whose product is integer; None likewise.
        tokens: most rows that a linear sees; None likewise.
        float_bytes: all tensors in bf16.
        packed_bytes: what `convert` stores, a float parameter in bf16.
    """

    flops: dict[str, int] | None
    integer_flops_share: float | None
    tokens: int | None
    float_bytes: int
    packed_bytes: int


def coverage(model: nn.Module, family: Family, plan: Plan) -> Coverage:
    """What a plan makes of a model.

    Args:
        model: a float transformer; its weights are not read.
        family: of its class.
        plan: for it.
    """
    total = FLOAT_BYTES * sum(tensor.numel() for tensor in model.state_dict().values())
    packed = total + site_bytes(plan)
    formats = planned_formats(model, plan)
    for entry in plan.linears:
        layer_format = formats[entry.name]
        if layer_format is not None:
            stored = layer_format.tensors(entry.shape[1], entry.shape[0]).values()
            packed += sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in stored)
            packed -= FLOAT_BYTES * parameters_of(model, entry.name)
    for block, table in family.block_tables(model).items():
        for name in table.tables:  # rows in bf16 become rows and factors in fp32
            packed += (2 * 4 - FLOAT_BYTES) * model.get_parameter(f"{block}.{name}").numel()
    if family.example_inputs is None:
        return Coverage(None, None, None, total, packed)
    rows = _count_rows(model, family)
    flops = {e.name: 2 * rows[e.name] * e.shape[0] * e.shape[1] for e in plan.linears}
    integer = sum(flops[entry.name] for entry in plan.linears if entry.is_integer)
    return Coverage(flops, integer / sum(flops.values()), max(rows.values()), total, packed)


def planned_formats(model: nn.Module, plan: Plan) -> dict[str, LayerFormat | None]:
    """Linear name -> the format that it will have, before it is known whether a shift gives it a bias."""
    return {
        entry.name: entry.layer_format(get_linear(model, entry.name).bias is not None)
        for entry in plan.linears
    }


def site_bytes(plan: Plan) -> int:
    """Of the factors [K] fp32, and of static scales and zero points; shifts are not known before the statistics."""
    total = 0
    for site, readers in zip(plan.sites, plan.readers().values(), strict=True):
        integer = [reader for reader in readers if reader.is_integer]
        if integer:
            total += 4 * integer[0].shape[1] * site.transforms
            total += 8 * (integer[0].activations == "static")
    return total


def parameters_of(model: nn.Module, name: str) -> int:
    """Weights and biases of a linear."""
    return sum(p.numel() for p in get_linear(model, name).parameters(recurse=False))


def _count_rows(model: Any, family: Family) -> dict[str, int]:
    """Rows that every linear sees for one image: a forward of a model without weights."""
    with init_empty_weights():
        empty = type(model).from_config(model.config)
    empty = nn.Module.to(empty, "meta")
    rows: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
            rows[name] = rows.get(name, 0) + args[0].numel() // module.in_features

        return hook

    for name, module in empty.named_modules():
        if isinstance(module, nn.Linear):
            rows[name] = 0
            module.register_forward_pre_hook(count(name))
    assert family.example_inputs is not None
    inputs = family.example_inputs(empty)
    for name, tokens in TOKENS.get(family.architecture, {}).items():
        few = inputs[name]
        inputs[name] = few.new_empty(*few.shape[:-2], tokens, few.shape[-1])
    with torch.no_grad():
        empty(**inputs)
    return rows
