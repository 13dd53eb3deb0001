"""Fold smoothing factors and shifts into a block's weights. Exact: the float function of the block does not change.

A site's input X becomes (X - z_g) u with u = 1 / s and z_g one shift per timestep group g (HTG Eq. 5-11):

* consumers: bias b_g = b + W z_g with the unquantized W, then columns W <- W diag(s);
* AdaLN producer: shift rows (W, b_g) <- u (W, b - z_g); scale rows W <- u W, b <- u (b + 1), so that the linear
  emits the multiplier a = (1 + scale) / s itself (HTG Eq. 11, PTQ4DiT Eq. 19-21);
* a table added to a modulation that all blocks share (adaLN-single): as the bias of a diagonal modulation linear,
  whose weight is one factor per row;
* V producer: rows (W, b) <- u (W, b - z), exact because softmax rows sum to one;
* norms: weight <- u weight, bias <- u (bias - z), for X = norm(h) * weight + bias;
* products: rows (W, b) <- u (W, b), for X = linear(h) * g(h); a shift would be multiplied by g, so there is none;
* anywhere else the quantizer subtracts z_g and multiplies by u.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ditq_converters.methods import Transform
from ditq_runtime.families import (
    BlockTable,
    NormWeights,
    OnTheFly,
    ProductRows,
    Site,
    ValueRows,
    get_linear,
    rows_of,
)
from ditq_runtime.families.sites import Rows


@dataclass
class LinearTensors:
    """A linear in fp64: weight [N, K]; bias [G, N], one row per timestep group, or None.

    A modulation table [N] is one too: weight [N, 1], the factor of every row, and the table as its bias; and so is a
    norm: weight [N, 1].
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear) -> LinearTensors:
        """Copy a module's tensors to fp64 on the CPU."""
        bias = None if linear.bias is None else linear.bias.detach().double().cpu()[None].clone()
        weight = linear.weight.detach().to("cpu", torch.float64, copy=True)
        return cls(weight, bias)

    @classmethod
    def of_table(cls, table: torch.Tensor) -> LinearTensors:
        """A modulation table in fp64 on the CPU, with factors of one."""
        rows = table.detach().double().cpu().reshape(1, -1).clone()
        return cls(torch.ones(rows.shape[1], 1, dtype=torch.float64), rows)

    @classmethod
    def of_norm(cls, norm: nn.Module) -> LinearTensors:
        """A norm's weight and bias in fp64 on the CPU."""
        fields = {name: p.detach().double().cpu() for name, p in norm.named_parameters()}
        bias = fields["bias"][None].clone() if "bias" in fields else None
        return cls(fields["weight"][:, None].clone(), bias)

    def add_to_bias(self, term: torch.Tensor) -> None:
        """Add [G, N] or [1, N] to the bias, which grows a row per group where the term has them."""
        self.bias = term.clone() if self.bias is None else self.bias + term

    def scale_rows(self, rows: slice, u: torch.Tensor) -> None:
        """Multiply some rows of weight and bias by u [rows]."""
        self.weight[rows] *= u[:, None]
        if self.bias is not None:
            self.bias[:, rows] *= u


Block = dict[str, LinearTensors]


def block_linears(block: nn.Module, table: BlockTable) -> Block:
    """What a fold may change: consumers of the block's sites, modulation linears and tables, and norms."""
    linears = {name: LinearTensors.of(get_linear(block, name)) for name in table.linears}
    tables = {name: LinearTensors.of_table(block.get_parameter(name)) for name in table.tables}
    norms = {name: LinearTensors.of_norm(block.get_submodule(name)) for name in table.norms}
    return linears | tables | norms


def site_weight(linears: Block, site: Site) -> torch.Tensor:
    """[N, K] fp64: the weights of all linears that read the site, stacked."""
    return torch.cat([linears[name].weight for name in site.consumers])


def fold_block(
    linears: Block,
    table: BlockTable,
    transforms: dict[str, Transform],
    in_quantizer: Collection[str] = (),
    float_readers: Collection[str] = (),
) -> dict[str, Transform]:
    """Fold in place; every AdaLN modulation becomes direct (emits its multiplier), with or without factors.

    Args:
        linears: the block's linears, fp64; changed in place.
        table: of the block.
        transforms: site name -> what happens to it; sites that are absent are left alone.
        in_quantizer: sites whose transform the quantizer applies, though a producer could.
        float_readers: consumers without a quantizer: they read what the producer makes.

    Returns:
        Consumer name -> what its quantizer applies: what no producer absorbs, 1 and 0 where one does.

    Raises:
        ValueError: a shift on channels that no producer can take it from.
    """
    on_the_fly = {}
    for site in table.sites:
        transform = transforms.get(site.name, Transform())
        taken, left = divide(site, transform, linears, in_quantizer)
        _fold_rows(linears, site, taken)
        for name in site.consumers:
            _absorb(linears[name], taken if name in float_readers else transform)
            if left is not None and name not in float_readers:
                on_the_fly[name] = left
    return on_the_fly


def divide(
    site: Site, transform: Transform, linears: Block, in_quantizer: Collection[str]
) -> tuple[Transform, Transform | None]:
    """What the producer of a site takes of its transform, and what is left to the quantizer; None for nothing.

    Raises:
        ValueError: a shift that the producer cannot take.
    """
    smooth, shift = transform.smooth, transform.shift
    if site.name in in_quantizer or isinstance(site.producer, OnTheFly):
        return Transform(), None if smooth is None and shift is None else transform
    match site.producer:
        case NormWeights(norm) if shift is not None:
            if linears[norm].bias is None or len(shift) > 1:
                raise ValueError(
                    "fold: a norm takes one shift if it has a bias, and none otherwise; leave it to the quantizer"
                )
        case ProductRows() if shift is not None:
            raise ValueError(
                "fold: a product takes no shift, its other factor would multiply it; leave it to the quantizer"
            )
        case ValueRows(values, beyond):
            width = len(linears[values[0]].weight)
            if shift is not None and bool((shift[:, width:] != 0).any()):
                raise ValueError(
                    f"fold: site {site.name} cannot be shifted beyond its {width} channels of V: {beyond}"
                )
            if smooth is not None and not bool((smooth[width:] == 1).all()):
                taken, left = smooth.clone(), smooth.clone()
                taken[width:], left[:width] = 1, 1
                return Transform(taken, shift), Transform(left)
    return transform, None


def _made_by(linears: Block, site: Site) -> Iterator[tuple[Rows, slice]]:
    """What makes the channels of a site, the first ones, and which of its rows."""
    channels = linears[site.consumers[0]].weight.shape[1]
    for made in rows_of(site.producer, channels):
        width = min(channels, len(linears[made.owner].weight) - made.start)
        yield made, slice(made.start, made.start + width)


def _fold_rows(linears: Block, site: Site, transform: Transform) -> None:
    """The producer's side: its rows make the transformed input."""
    for made, rows in _made_by(linears, site):
        linear, width = linears[made.owner], rows.stop - rows.start
        shift = None if transform.shift is None else -transform.shift[:, :width]
        if made.multiplies:
            shift = torch.ones(1, width, dtype=torch.float64)
        if shift is not None:
            term = torch.zeros(len(shift), len(linear.weight), dtype=torch.float64)
            term[:, rows] = shift
            linear.add_to_bias(term)
        if transform.smooth is not None:
            linear.scale_rows(rows, 1 / transform.smooth[:width])


def _absorb(linear: LinearTensors, transform: Transform) -> None:
    """The consumer's side: what the shift took away comes back through the bias; columns undo the factor."""
    if transform.shift is not None:
        linear.add_to_bias(transform.shift @ linear.weight.t())
    if transform.smooth is not None:
        linear.weight *= transform.smooth


@dataclass
class Units:
    """How folds changed the output of a linear: y' = (y + added) * scale.

    Attributes:
        scale: [N] fp64.
        added: [1, N] fp64, or [G, N] where shifts have timestep groups.
    """

    scale: torch.Tensor
    added: torch.Tensor


def output_units(
    linears: Block, table: BlockTable, taken: dict[str, Transform]
) -> dict[str, Units]:
    """What `fold_block` does to the outputs of what producers are made of: linears, tables, norms.

    Args:
        linears: of the block; their shapes are read.
        table: of the block.
        taken: site name -> what its producer takes.
    """
    found: dict[str, Units] = {}
    for site in table.sites:
        transform = taken.get(site.name, Transform())
        for made, rows in _made_by(linears, site):
            count, width = len(linears[made.owner].weight), rows.stop - rows.start
            fresh = Units(torch.ones(count).double(), torch.zeros(1, count).double())
            units = found.setdefault(made.owner, fresh)
            if transform.smooth is not None:
                units.scale[rows] = 1 / transform.smooth[:width]
            if made.multiplies:
                units.added[:, rows] = 1
            elif transform.shift is not None:
                groups = max(len(units.added), len(transform.shift))
                units.added = units.added.expand(groups, -1).clone()
                units.added[:, rows] = -transform.shift[:, :width]
    return found


def stored_folds(
    linears: Block,
    table: BlockTable,
    transforms: dict[str, Transform],
    in_quantizer: Collection[str] = (),
) -> dict[str, dict[str, torch.Tensor]]:
    """What the checkpoint keeps of the folds: site name -> `scale` [K] and, with a shift, `fold_shift` [S, K]; fp32.

    Shifts run by rising timestep, as the bias tables do; factors beyond V are the quantizer's.
    """
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for site in table.sites:
        taken, _ = divide(site, transforms.get(site.name, Transform()), linears, in_quantizer)
        stored = {} if taken.shift is None else {"fold_shift": taken.shift.flip(0).float()}
        if taken.smooth is not None:
            stored["scale"] = taken.smooth.float().clone()
        elif stored:
            stored["scale"] = torch.ones_like(stored["fold_shift"][0])
        if stored:
            kept[site.name] = stored
    return kept


def norm_tensors(norm: LinearTensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the checkpoint stores of a folded norm: `weight` [K] and, where it has one, `bias` [K]."""
    stored = {"weight": norm.weight[:, 0].to(dtype)}
    if norm.bias is not None:
        stored["bias"] = norm.bias[0].to(dtype)
    return {name: tensor.contiguous() for name, tensor in stored.items()}
