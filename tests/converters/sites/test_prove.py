"""Folds are proposed from the dataflow and kept only if they hold: a small block that computes what its folds need."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ditq_converters.sites.folds import propose
from ditq_converters.sites.prove import Prover
from ditq_converters.sites.trace import trace
from ditq_runtime.families import (
    BlockTable,
    NormWeights,
    OnTheFly,
    ProductRows,
    Site,
    ValueRows,
)

WIDTH, HEADS, BATCH, TOKENS = 8, 2, 2, 3
LINEAR = ("q", "k", "v", "out", "up", "down", "taps", "both")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        for name in LINEAR:
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=name != "v"))
        self.up, self.both = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, leak):
        y = self.norm(x)
        q, k, v = (
            linear(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        gate, linear = self.up(self.rms(x)).chunk(2, -1)
        product = F.silu(gate) * linear
        x = x + self.down(product) + self.both(torch.cat([attended, F.gelu(x)], -1))
        return x + leak * self.taps(y)


class Model(nn.Module):
    """`leak` opens a second way out of the norm that a table may forget."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x, leak):
        return self.blocks[0](x, leak)


TABLE = BlockTable(
    tuple(
        Site(names[0], names, OnTheFly(""))
        for names in (("q", "k", "v", "taps"), ("out",), ("up",), ("down",), ("both",))
    )
)


@pytest.fixture(scope="module")
def case():
    """A traced block, its proposed table, a prover."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model().double().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.3, 0.8)
        inputs = {
            "x": torch.randn(BATCH, TOKENS, WIDTH).double(),
            "leak": torch.tensor(0.5).double(),
        }
    graph, out = trace(model, inputs)
    return (
        model,
        propose(graph, "blocks.0", TABLE),
        Prover(model, inputs, graph, out),
    )


def test_what_the_dataflow_suggests(case):
    _, table, _ = case
    producers = {site.name: site.producer for site in table.sites}
    assert producers["q"] == NormWeights("norm", takes_shift=True)
    assert producers["out"] == ValueRows(("v",))
    assert producers["up"] == NormWeights("rms", takes_shift=False)
    assert producers["down"] == ProductRows("up", WIDTH, 2 * WIDTH)
    assert producers["both"].values == ("v",)
    assert producers["both"].rest is not None


def test_values_that_two_sites_mix_with_other_channels_hold_neither(case):
    """`out` reads the attention's output, `both` reads it beside GELU: one factor in V would reach both."""
    _, table, prover = case
    assert prover.error({"blocks.0": table}) > 1e-3
    (proven,) = prover.prove({"blocks.0": table})[0].values()
    producers = {site.name: site.producer for site in proven.sites}
    assert isinstance(producers["out"], OnTheFly)
    assert isinstance(producers["both"], OnTheFly)
    assert isinstance(producers["q"], NormWeights)
    assert isinstance(producers["down"], ProductRows)
    assert prover.error({"blocks.0": proven}) < 1e-13


def test_a_forgotten_reader_is_found(case):
    _, table, prover = case
    norm, *_ = table.sites
    forgotten = Site("q", ("q", "k", "v"), norm.producer)
    assert prover.error({"blocks.0": BlockTable((norm,))}) < 1e-13
    assert prover.error({"blocks.0": BlockTable((forgotten,))}) > 1e-3


def test_rows_in_the_wrong_place_are_found(case):
    _, table, prover = case
    (down,) = (site for site in table.sites if site.name == "down")
    assert prover.error({"blocks.0": BlockTable((down,))}) < 1e-13
    wrong = Site("down", ("down",), ProductRows("up", 0, WIDTH))
    assert prover.error({"blocks.0": BlockTable((wrong,))}) > 1e-3


def test_a_shift_that_a_mask_breaks_is_dropped(case):
    """Attention whose weights do not sum to one carries factors, no shift; found by trying."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                [nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH) for n in "qvo"})]
            )

        def forward(self, x):
            block = self.blocks[0]
            q, v = block["q"](x), block["v"](x)
            return block["o"](torch.matmul(q @ x.transpose(1, 2), v))

    torch.manual_seed(0)
    model = Linear().double().requires_grad_(False)
    inputs = {"x": torch.randn(BATCH, TOKENS, WIDTH).double()}
    graph, out = trace(model, inputs)
    table = propose(graph, "blocks.0", BlockTable((Site("o", ("o",), OnTheFly("")),)))
    (proven,) = Prover(model, inputs, graph, out).prove({"blocks.0": table})[0].values()
    assert [site.producer for site in proven.sites] == [ValueRows(("v",), takes_shift=False)]


def test_the_model_is_as_it_was_after_proofs(case):
    model, table, prover = case
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prover.prove({"blocks.0": table})
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_reason_names_what_made_the_input():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                [nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, WIDTH)})]
            )

        def forward(self, x):
            return self.blocks[0]["b"](F.gelu(self.blocks[0]["a"](x)))

    inputs = {"x": torch.randn(BATCH, TOKENS, WIDTH).double()}
    graph, _ = trace(Mlp().double(), inputs)
    sites = tuple(Site(name, (name,), OnTheFly("")) for name in "ab")
    first, second = (s.producer for s in propose(graph, "blocks.0", BlockTable(sites)).sites)
    assert (first.kind, second.kind) == ("X", "G")
    assert "nothing in the model" in first.reason
    assert "the output of GELU" in second.reason
