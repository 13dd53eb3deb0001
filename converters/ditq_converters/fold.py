"""Fold smoothing factors and shifts into a block's weights. Exact: the float function of the block does not change.

A site's input X becomes (X - z_g) u with u = 1 / s and z_g one shift per timestep group g (HTG Eq. 5-11):

* consumers: bias b_g = b + W z_g with the unquantized W, then columns W <- W diag(s);
* AdaLN producer: shift rows (W, b_g) <- u (W, b - z_g); scale rows W <- u W, b <- u (b + 1), so that the linear
  emits the multiplier a = (1 + scale) / s itself (HTG Eq. 11, PTQ4DiT Eq. 19-21);
* V producer: rows (W, b) <- u (W, b - z), exact because softmax rows sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ditq_converters.methods import Transform
from ditq_runtime.families import AdaLN, Family, OnTheFly, Site, ValueRows, get_linear


@dataclass
class LinearTensors:
    """A linear in fp64: weight [N, K]; bias [G, N], one row per timestep group, or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear) -> LinearTensors:
        """Copy a module's tensors to fp64 on the CPU."""
        bias = None if linear.bias is None else linear.bias.detach().double().cpu()[None].clone()
        return cls(linear.weight.detach().double().cpu().clone(), bias)

    def add_to_bias(self, term: torch.Tensor) -> None:
        """Add [G, N] or [1, N] to the bias, which grows a row per group where the term has them."""
        self.bias = term.clone() if self.bias is None else self.bias + term

    def scale_rows(self, rows: slice, u: torch.Tensor) -> None:
        """Multiply some rows of weight and bias by u [rows]."""
        self.weight[rows] *= u[:, None]
        if self.bias is not None:
            self.bias[:, rows] *= u


Block = dict[str, LinearTensors]


def block_linears(block: nn.Module, family: Family) -> Block:
    """The linears of a block that a scheme can list: consumers of its sites and its modulation linears."""
    names = [name for site in family.sites for name in site.consumers] + list(family.modulations)
    return {name: LinearTensors.of(get_linear(block, name)) for name in names}


def site_weight(linears: Block, site: Site) -> torch.Tensor:
    """[N, K] fp64: the weights of all linears that read the site, stacked."""
    return torch.cat([linears[name].weight for name in site.consumers])


def fold_block(
    linears: Block, family: Family, transforms: dict[str, Transform]
) -> dict[str, torch.Tensor]:
    """Fold in place; every AdaLN modulation becomes direct (emits its multiplier), with or without factors.

    Args:
        linears: the block's linears, fp64; changed in place.
        family: its table.
        transforms: site name -> what happens to it; sites that are absent are left alone.

    Returns:
        Consumer name -> u = 1 / s [K] fp64 for the factors no producer absorbs.

    Raises:
        ValueError: a shift on a site that no producer can take it from.
    """
    on_the_fly = {}
    for site in family.sites:
        transform = transforms.get(site.name, Transform())
        for name in site.consumers:
            _absorb(linears[name], transform)
        u = torch.ones(1, dtype=torch.float64) if transform.smooth is None else 1 / transform.smooth
        match site.producer:
            case AdaLN() as producer:
                chunks = family.modulations[producer.modulation]
                _fold_modulation(linears[producer.modulation], chunks, producer, u, transform.shift)
            case ValueRows(value):
                if transform.shift is not None:
                    linears[value].add_to_bias(-transform.shift)
                linears[value].scale_rows(slice(None), u)
            case OnTheFly(reason):
                if transform.shift is not None:
                    raise ValueError(f"fold: site {site.name} cannot be shifted: {reason}")
                if transform.smooth is not None:
                    on_the_fly.update(dict.fromkeys(site.consumers, u))
    return on_the_fly


def _absorb(linear: LinearTensors, transform: Transform) -> None:
    """The consumer's side: what the shift took away comes back through the bias; columns undo the factor."""
    if transform.shift is not None:
        linear.add_to_bias(transform.shift @ linear.weight.t())
    if transform.smooth is not None:
        linear.weight *= transform.smooth


def _fold_modulation(
    linear: LinearTensors, chunks: int, producer: AdaLN, u: torch.Tensor, shift: torch.Tensor | None
) -> None:
    num_rows = linear.weight.shape[0]
    width = num_rows // chunks
    rows = [slice(i * width, (i + 1) * width) for i in range(chunks)]
    groups = 1 if shift is None else shift.shape[0]
    term = torch.zeros(groups, num_rows, dtype=torch.float64)
    term[:, rows[producer.scale_chunk]] = 1.0
    if shift is not None:
        term[:, rows[producer.shift_chunk]] = -shift
    linear.add_to_bias(term)
    linear.scale_rows(rows[producer.scale_chunk], u)
    linear.scale_rows(rows[producer.shift_chunk], u)
