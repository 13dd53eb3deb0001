"""The folds of a block are compared with its real weights: a right one passes, whatever is wrong is named."""

import math
import sys

import pytest
import torch
from torch import nn

from ditq_converters import convert
from ditq_converters.convert.fold import block_linears, fold_block
from ditq_converters.convert.recheck import check_folds
from ditq_converters.methods import Transform
from ditq_converters.plan.recipe import Recipe
from ditq_runtime.families import BlockTable, NormWeights, ProductRows, Site, ValueRows
from ditq_runtime.families.dit import BLOCK

WIDTH, GROUPS = 64, 3


def drawn(width, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(width, generator=generator, dtype=torch.float64).exp()
    return Transform(smooth, torch.randn(groups, width, generator=generator, dtype=torch.float64))


TRANSFORMS = {
    "qkv": drawn(WIDTH, GROUPS, 0), "o_proj": drawn(WIDTH, 1, 1), "fc1": drawn(WIDTH, GROUPS, 2),
    "fc2": Transform(drawn(4 * WIDTH, 1, 3).smooth),
}  # fmt: skip


class Gated(nn.Module):
    """A norm with a bias before a gated MLP, values of another width than their site."""

    def __init__(self):
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(16), nn.RMSNorm(16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(20, 16, bias=False)
        self.v, self.out = nn.Linear(16, 12), nn.Linear(24, 16)


GATED = BlockTable((
    Site("up", ("up",), NormWeights("norm", True)),
    Site("v", ("v",), NormWeights("rms", False)),
    Site("down", ("down",), ProductRows("up", 20, 40)),
    Site("out", ("out",), ValueRows(("v",), "they are something else")),
))  # fmt: skip


def gated_transforms():
    out = drawn(24, 1, 6)
    out.shift[:, 12:] = 0
    return {
        "up": drawn(16, 1, 4), "v": Transform(drawn(16, 1, 5).smooth),
        "down": Transform(drawn(20, 1, 7).smooth), "out": out,
    }  # fmt: skip


def folded(case, make_dit):
    """A float block, its table, what it became, its transforms, sites in the quantizer, readers that stay float."""
    dit = case != "gated"
    module = make_dit(3).transformer_blocks[1] if dit else Gated()
    table, transforms = (BLOCK, TRANSFORMS) if dit else (GATED, gated_transforms())
    in_quantizer = ["fc1"] if case == "in the quantizer" else []
    floats = ["attn1.to_out.0", "ff.net.0.proj"] if case == "in the quantizer" else []
    linears = block_linears(module, table)
    fold_block(linears, table, transforms, in_quantizer, floats)
    return module, table, linears, transforms, in_quantizer, floats


def check(module, table, linears, *rest):
    check_folds(module, "blocks.1", table, linears, *rest)


CASES = ("dit", "in the quantizer", "gated")


@pytest.mark.parametrize("case", CASES)
def test_right_folds_pass(case, make_dit):
    check(*folded(case, make_dit))


@pytest.mark.parametrize("case", CASES)
def test_every_wrong_row_column_and_bias_is_named(case, make_dit):
    """By one part in 2^40, far above rounding; a bias beside what a sum of 300 terms rounds."""
    module, table, linears, *rest = folded(case, make_dit)
    for name, linear in linears.items():
        for part in ("row", "column", "bias"):
            weight, bias = linear.weight, linear.bias
            if part == "row":
                linear.weight = weight.clone()
                linear.weight[len(weight) // 2] *= 1 + 2**-40
            elif part == "column":
                linear.weight = weight.clone()
                linear.weight[:, weight.shape[1] // 2] *= 1 + 2**-40
            elif bias is not None:
                linear.bias = bias + 2**-30 * bias.abs().amax()
            else:
                linear.bias = torch.ones(1, len(weight)).double()
            with pytest.raises(
                ValueError, match=rf"convert: blocks\.1\.{name}: .* place=quantizer"
            ):
                check(module, table, linears, *rest)
            linear.weight, linear.bias = weight, bias
    check(module, table, linears, *rest)


@pytest.mark.parametrize("wrong", [0.0, -1.0, 1e-60, 1e60, math.inf, math.nan])
def test_a_factor_that_fp32_cannot_hold_is_refused_by_the_site(wrong, make_dit):
    """1e-60 has a reciprocal that is infinite in fp32, 1e60 one that is zero."""
    module, table, linears, transforms, *rest = folded("dit", make_dit)
    smooth = TRANSFORMS["fc1"].smooth.clone()
    smooth[5] = wrong
    given = transforms | {"fc1": Transform(smooth)}
    with pytest.raises(ValueError, match=r"convert: blocks\.1\.fc1: its method gave a factor"):
        check(module, table, linears, given, *rest)


def test_a_conversion_is_checked(make_dit, monkeypatch):
    """A fold that forgets the multiplier's 1 is refused before anything is packed."""
    block = vars(sys.modules["ditq_converters.convert.block"])
    monkeypatch.setitem(block, "fold_block", lambda *given: {})
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.norm1\.linear: its folded"):
        convert(make_dit(), Recipe("linear"), quiet=True)
