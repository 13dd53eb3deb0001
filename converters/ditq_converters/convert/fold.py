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

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from ditq_converters.methods import Transform
from ditq_runtime.families import (
    AdaLN,
    BlockTable,
    NormWeights,
    OnTheFly,
    ProductRows,
    Site,
    ValueRows,
    get_linear,
)


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
        folded, left = transform, None  # what the producer takes, and what it does not
        if site.name in in_quantizer or isinstance(site.producer, OnTheFly):
            folded, left = Transform(), transform if _does_something(transform) else None
        match site.producer:
            case AdaLN() as producer:
                chunks = table.chunks(producer.modulation)
                _fold_modulation(linears[producer.modulation], chunks, producer, folded)
            case ValueRows(values):
                folded, rest = _fold_values([linears[name] for name in values], site, folded)
                left = rest or left
            case NormWeights(norm):
                fold_norm(linears[norm], folded)
            case ProductRows(linear) as producer:
                fold_product(linears[linear], producer, folded)
        for name in site.consumers:
            _absorb(linears[name], folded if name in float_readers else transform)
            if left is not None and name not in float_readers:
                on_the_fly[name] = left
    return on_the_fly


def _does_something(transform: Transform) -> bool:
    return transform.smooth is not None or transform.shift is not None


def stored_folds(
    linears: Block,
    table: BlockTable,
    transforms: dict[str, Transform],
    in_quantizer: Collection[str] = (),
) -> dict[str, dict[str, torch.Tensor]]:
    """What the checkpoint keeps of the folds: site name -> `scale` [K] and, with a shift, `fold_shift` [S, K]; fp32.

    Shifts run by rising timestep, as the bias tables do.
    """
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for site in table.sites:
        transform = transforms.get(site.name, Transform())
        shift, smooth = transform.shift, transform.smooth
        on_the_fly = isinstance(site.producer, OnTheFly) or site.name in in_quantizer
        if on_the_fly or (shift is None and smooth is None):
            continue
        stored = {} if shift is None else {"fold_shift": shift.flip(0).float()}
        scale = (
            torch.ones_like(stored["fold_shift"][0]) if smooth is None else smooth.float().clone()
        )
        if isinstance(site.producer, ValueRows):  # the quantizer applies what lies beyond V
            scale[len(linears[site.producer.values[0]].weight) :] = 1
        stored["scale"] = scale
        kept[site.name] = stored
    return kept


def _absorb(linear: LinearTensors, transform: Transform) -> None:
    """The consumer's side: what the shift took away comes back through the bias; columns undo the factor."""
    if transform.shift is not None:
        linear.add_to_bias(transform.shift @ linear.weight.t())
    if transform.smooth is not None:
        linear.weight *= transform.smooth


def _fold_values(
    values: list[LinearTensors], site: Site, transform: Transform
) -> tuple[Transform, Transform | None]:
    """Fold into the rows of V.

    Returns:
        What V took, and what is left for the channels beyond; None for nothing.
    """
    width = len(values[0].weight)
    smooth, shift = transform.smooth, transform.shift
    if shift is not None and bool((shift[:, width:] != 0).any()):
        assert isinstance(site.producer, ValueRows)
        raise ValueError(
            f"fold: site {site.name} cannot be shifted beyond its {width} channels of V: {site.producer.rest}"
        )
    for value in values:
        if shift is not None:
            value.add_to_bias(-shift[:, :width])
        if smooth is not None:
            value.scale_rows(slice(None), 1 / smooth[:width])
    if smooth is None or bool((smooth[width:] == 1).all()):
        return transform, None
    taken, left = smooth.clone(), smooth.clone()
    taken[width:], left[:width] = 1, 1
    return Transform(taken, shift), Transform(left)


def _fold_modulation(
    linear: LinearTensors, chunks: int, producer: AdaLN, transform: Transform
) -> None:
    num_rows = linear.weight.shape[0]
    width = num_rows // chunks
    rows = [slice(i * width, (i + 1) * width) for i in range(chunks)]
    scale, shift = rows[producer.scale_chunk], rows[producer.shift_chunk]
    groups = 1 if transform.shift is None else transform.shift.shape[0]
    term = torch.zeros(groups, num_rows, dtype=torch.float64)
    term[:, scale] = 1.0
    if transform.shift is not None:
        term[:, shift] = -transform.shift
    linear.add_to_bias(term)
    if transform.smooth is not None:
        linear.scale_rows(scale, 1 / transform.smooth)
        linear.scale_rows(shift, 1 / transform.smooth)


def fold_norm(norm: LinearTensors, transform: Transform) -> None:
    """Fold into a norm in place: its weight [K, 1] and its bias [1, K] or None.

    Raises:
        ValueError: a shift, and no bias to take it.
    """
    if transform.shift is not None:
        if norm.bias is None or len(transform.shift) > 1:
            raise ValueError(
                "fold: a norm takes one shift if it has a bias, and none otherwise; leave it to the quantizer"
            )
        norm.add_to_bias(-transform.shift)
    if transform.smooth is not None:
        norm.scale_rows(slice(None), 1 / transform.smooth)


def fold_product(linear: LinearTensors, producer: ProductRows, transform: Transform) -> None:
    """Fold a factor into some rows of a linear in place.

    Raises:
        ValueError: a shift.
    """
    if transform.shift is not None:
        raise ValueError(
            "fold: a product takes no shift, its other factor would multiply it; leave it to the quantizer"
        )
    if transform.smooth is not None:
        linear.scale_rows(slice(producer.start, producer.stop), 1 / transform.smooth)


def norm_tensors(norm: LinearTensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the checkpoint stores of a folded norm: `weight` [K] and, where it has one, `bias` [K]."""
    stored = {"weight": norm.weight[:, 0].to(dtype)}
    if norm.bias is not None:
        stored["bias"] = norm.bias[0].to(dtype)
    return {name: tensor.contiguous() for name, tensor in stored.items()}
