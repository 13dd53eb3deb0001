"""How much of a model a plan covers: share of FLOPs in integers, and bytes before and after. Nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ditq_converters.calibrate.captions import Captions
from ditq_converters.calibrate.hosts import HOSTS, Batch, Host
from ditq_converters.plan.layers import LayerPlan
from ditq_runtime.families import family_of

FLOAT_BYTES = 2  # bf16, what large models are published and run in


@dataclass(frozen=True)
class Coverage:
    """Of one image at the size that the model is calibrated at.

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


def coverage(model: nn.Module, plans: list[LayerPlan]) -> Coverage:
    """What a plan makes of a model.

    Args:
        model: a float transformer; its weights are not read.
        plans: of `plan_layers`.
    """
    total = FLOAT_BYTES * sum(tensor.numel() for tensor in model.state_dict().values())
    packed = total
    for plan in plans:
        if plan.format is not None:
            packed += _stored_bytes(plan) - FLOAT_BYTES * plan.parameters
    for block, table in family_of(type(model).__name__).block_tables(model).items():
        for name in table.tables:  # rows in bf16 become rows and factors in fp32
            packed += (2 * 4 - FLOAT_BYTES) * model.get_parameter(f"{block}.{name}").numel()
    host = HOSTS.get(type(model).__name__)
    if host is None:
        return Coverage(None, None, None, total, packed)
    rows = _count_rows(model, host)
    flops = {p.name: 2 * rows[p.name] * p.in_features * p.out_features for p in plans}
    integer = sum(flops[p.name] for p in plans if p.format is not None and p.format.integer_gemm)
    return Coverage(flops, integer / sum(flops.values()), max(rows.values()), total, packed)


def _stored_bytes(plan: LayerPlan) -> int:
    assert plan.format is not None
    tensors = plan.format.tensors(plan.in_features, plan.out_features).values()
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in tensors)


def _count_rows(model: Any, host: Host) -> dict[str, int]:
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
    latents = torch.empty(1, *host.latent_shape(empty), device="meta")
    one = torch.zeros(1, dtype=torch.int64)
    batch = Batch(latents, latents.new_empty(1), one, _captions(empty, host), 1.0)
    with torch.no_grad():
        host.call(empty, batch)
    return rows


def _captions(model: Any, host: Host) -> Captions | None:
    """One caption of the length that the pipeline pads to, on meta."""
    tensors = {}
    for name, width in host.captions(model).items():
        shape = {
            "prompt_embeds": (1, host.caption_tokens, width),
            "prompt_attention_mask": (1, host.caption_tokens),
        }.get(name, (1, width))
        tensors[name] = torch.empty(shape, device="meta")
    return Captions(tensors, 1) if tensors else None
