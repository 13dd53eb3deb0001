"""Fold smoothing factors into a block's weights. Exact: the float function of the block does not change.

With u = 1 / s: consumers W <- W diag(s); AdaLN producer: shift rows (W, b) <- u (W, b), scale rows W <- u W,
b <- u (b + 1), so that the linear emits the multiplier a = (1 + scale) / s itself (HTG Eq. 11, PTQ4DiT Eq. 19-21);
V producer: rows (W, b) <- u (W, b), exact because softmax rows sum to one (METHODS 2.2a).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ditq_runtime.families import AdaLN, Family, OnTheFly, Site, ValueRows, get_linear


@dataclass
class LinearTensors:
    """A linear in fp64: weight [N, K], bias [N] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear) -> LinearTensors:
        """Copy a module's tensors to fp64 on the CPU."""
        bias = None if linear.bias is None else linear.bias.detach().double().cpu().clone()
        return cls(linear.weight.detach().double().cpu().clone(), bias)


Block = dict[str, LinearTensors]


def block_linears(block: nn.Module, family: Family) -> Block:
    """The linears of a block that a scheme can list: consumers of its sites and its modulation linears."""
    names = [name for site in family.sites for name in site.consumers] + list(family.modulations)
    return {name: LinearTensors.of(get_linear(block, name)) for name in names}


def weight_absmax(linears: Block, site: Site) -> torch.Tensor:
    """[K] fp64: largest |W[n, k]| over all linears that read the site."""
    return torch.cat([linears[name].weight for name in site.consumers]).abs().amax(dim=0)


def fold_block(
    linears: Block, family: Family, smooth: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Fold in place; every AdaLN modulation becomes direct (emits its multiplier), with or without factors.

    Args:
        linears: the block's linears, fp64; changed in place.
        family: its table.
        smooth: site name -> s [K] fp64 > 0; sites that are absent have s = 1.

    Returns:
        Consumer name -> u = 1 / s [K] fp64 for the factors no producer absorbs.
    """
    on_the_fly = {}
    for site in family.sites:
        s = smooth.get(site.name)
        if s is not None:
            for name in site.consumers:
                linears[name].weight *= s
        u = torch.ones(1, dtype=torch.float64) if s is None else 1.0 / s
        match site.producer:
            case AdaLN() as producer:
                _fold_modulation(
                    linears[producer.modulation],
                    family.modulations[producer.modulation],
                    producer,
                    u,
                )
            case ValueRows(value) if s is not None:
                _scale_rows(linears[value], slice(None), u)
            case OnTheFly() if s is not None:
                on_the_fly.update(dict.fromkeys(site.consumers, u))
    return on_the_fly


def _fold_modulation(linear: LinearTensors, chunks: int, producer: AdaLN, u: torch.Tensor) -> None:
    width = linear.weight.shape[0] // chunks
    rows = [slice(i * width, (i + 1) * width) for i in range(chunks)]
    if linear.bias is None:
        linear.bias = torch.zeros(linear.weight.shape[0], dtype=torch.float64)
    linear.bias[rows[producer.scale_chunk]] += 1.0
    _scale_rows(linear, rows[producer.scale_chunk], u)
    _scale_rows(linear, rows[producer.shift_chunk], u)


def _scale_rows(linear: LinearTensors, rows: slice, u: torch.Tensor) -> None:
    linear.weight[rows] *= u[:, None]
    if linear.bias is not None:
        linear.bias[rows] *= u
