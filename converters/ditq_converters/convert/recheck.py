"""Check the folds of one block on its real weights: what was proven on a twin was done to them, in fp64.

A linear, a norm or a table gives y = W x + b. Folded it reads (x - z_g) / s and gives (y + a_g) u, so it must be

    W' = diag(u) W diag(s),    b'_g = u (b + W z_g + a_g),

with s and z of the site that it reads, u and a of the sites that it makes (AdaLN rows that emit a multiplier: a = 1).
A few rows and columns of each matrix are compared, which meet the factor of every input and every output.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from ditq_converters.convert.fold import Block, LinearTensors, Units, divide, output_units
from ditq_converters.convert.prefix import evenly
from ditq_converters.methods import Transform
from ditq_runtime.families import BlockTable

ROWS, COLUMNS = (
    32,
    4,
)  # of a matrix: a row shows the factor of every input, a column that of every output
EPS = 2.0**-53


def check_folds(
    module: nn.Module,
    block: str,
    table: BlockTable,
    folded: Block,
    transforms: dict[str, Transform],
    in_quantizer: Collection[str],
    float_readers: Collection[str],
) -> None:
    """Compare what `fold_block` made with the weights that it was made of.

    Args:
        module: the float block.
        block: its name.
        table: its table.
        folded: what `fold_block` made of its linears, norms and tables.
        transforms: as `fold_block` was given, and so are the others.
        in_quantizer: likewise.
        float_readers: likewise.

    Raises:
        ValueError: a factor or a shift that is no number of fp32, or a fold that is not what was proven; names it.
    """
    read: dict[str, Transform] = {}
    taken: dict[str, Transform] = {}
    for site in table.sites:
        transform = transforms.get(site.name, Transform())
        _check_numbers(f"{block}.{site.name}", transform)
        taken[site.name], _ = divide(site, transform, folded, in_quantizer)
        float_reads = taken[site.name]
        read |= {n: float_reads if n in float_readers else transform for n in site.consumers}
    given = output_units(folded, table, taken)
    for name, made in folded.items():
        if not _holds(_original(module, table, name), made, read.get(name), given.get(name)):
            raise ValueError(
                f"convert: {block}.{name}: its folded weights are not what the fold of its sites makes of them; give "
                "these sites place=quantizer in the plan, and report this model"
            )


def _check_numbers(site: str, transform: Transform) -> None:
    """Factors are stored as they are and as reciprocals, shifts as they are; all in fp32."""
    smooth, shift = transform.smooth, transform.shift
    stored = () if smooth is None else (smooth.float(), (1 / smooth).float())
    positive = all(bool((part > 0).all()) for part in stored)
    finite = (*stored, *(() if shift is None else (shift.float(),)))
    if not positive or not all(bool(torch.isfinite(part).all()) for part in finite):
        raise ValueError(
            f"convert: {site}: its method gave a factor or a shift that is zero or no number in fp32; calibrate on "
            "other inputs, or give the site method=linear in the plan"
        )


def _original(
    module: nn.Module, table: BlockTable, name: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W [N, K] and b [N] as the float block has them."""
    if name in table.tables:
        rows = module.get_parameter(name).detach().flatten()
        return torch.ones_like(rows)[:, None], rows
    part = module.get_submodule(name)
    bias = part._parameters.get("bias")
    weight = part.get_parameter("weight").detach()
    return weight.reshape(len(weight), -1), None if bias is None else bias.detach()


def _holds(
    original: tuple[torch.Tensor, torch.Tensor | None],
    made: LinearTensors,
    read: Transform | None,
    given: Units | None,
) -> bool:
    """Whether one map is what it should be, as far as it is looked at."""
    (weight, bias), read = original, read or Transform()
    outputs, inputs = weight.shape
    ones = torch.ones(1, dtype=torch.float64)
    s = ones.expand(inputs) if read.smooth is None else read.smooth
    u = ones.expand(outputs) if given is None else given.scale
    rows, columns = evenly(outputs, ROWS), evenly(inputs, COLUMNS)
    every = slice(None)
    for n, k in ((rows, every), (every, columns)):
        wanted = u[n, None] * _wide(weight[n][:, k]) * s[k]
        # both sides round each factor and each product once: at most 8 roundings
        if not bool(((made.weight[n][:, k] - wanted).abs() <= 8 * EPS * wanted.abs()).all()):
            return False
    if made.bias is None:
        return bias is None and read.shift is None and _keeps_zero(given)
    some = _wide(weight[rows])
    shift = torch.zeros(1, inputs, dtype=torch.float64) if read.shift is None else read.shift
    added = torch.zeros(1, 1).double() if given is None else given.added[:, rows]
    own = torch.zeros(1).double() if bias is None else _wide(bias[rows])
    wanted = u[rows] * (own + shift @ some.T + added)
    size = u[rows] * (own.abs() + shift.abs() @ some.abs().T + added.abs())
    # a sum of K + 2 terms, in any order, on both sides (Higham, Accuracy and Stability, Eq. 3.4), each rounded thrice
    bound = 2 * (inputs + 8) * EPS * size
    return bool(((made.bias[:, rows] - wanted).abs() <= bound).all())


def _keeps_zero(given: Units | None) -> bool:
    """Whether an output keeps its zero."""
    return given is None or not bool(given.added.any())


def _wide(part: torch.Tensor) -> torch.Tensor:
    return part.to("cpu", torch.float64)
