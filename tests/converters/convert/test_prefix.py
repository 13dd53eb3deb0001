"""Reaching a block: the blocks before it are not computed again, and nothing else changes."""

import pytest
import torch
from torch import nn

from ditq_converters.calibrate.transformer_calls import TransformerCall
from ditq_converters.convert.prefix import Prefix

BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


class Toy(nn.Module):
    """Three blocks with a linear each; `skip`: the last also reads what the first made."""

    def __init__(self, skip):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.skip, self.ran = skip, []
        for index, block in enumerate(self.blocks):
            block[0].register_forward_hook(lambda *_, index=index: self.ran.append(index))

    def forward(self, x):
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        return self.blocks[2](second + first if self.skip else second)


def calls(count=3):
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(2, 5, 8, generator=generator) for _ in range(count)]
    return [TransformerCall("transformer", 0.0, (x,), {}) for x in xs]


@pytest.fixture(params=[False, True], ids=["chain", "skip"])
def toy(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy(request.param).requires_grad_(False)


def by_hand(model, call, block):
    read = []
    handle = model.get_submodule(f"{block}.0").register_forward_pre_hook(
        lambda module, args: read.append(args[0].reshape(-1, 8))
    )
    call.replay(model)
    handle.remove()
    return read[0].double()


def test_what_is_read_is_what_a_whole_run_shows(toy):
    """Also behind a skip, where the block before is not all that a block reads; with a finished linear in between."""
    prefix = Prefix(toy, calls(), BLOCKS)
    double = nn.Linear(8, 8)
    double.load_state_dict({name: 2 * p for name, p in toy.blocks[0][0].state_dict().items()})
    changed = Toy(toy.skip)
    changed.load_state_dict(toy.state_dict())
    changed.blocks[0][0] = double
    for block in BLOCKS:
        prefix.enter(block)
        rows = prefix.rows("0")
        wanted, seen = rows.wanted, rows.seen
        assert torch.equal(wanted, torch.cat([by_hand(toy, c, block) for c in calls()]))
        if block == BLOCKS[0]:
            prefix.finish("blocks.0.0", double)
        else:
            assert torch.equal(seen, torch.cat([by_hand(changed, c, block) for c in calls()]))
        prefix.leave()


def test_blocks_before_are_computed_only_where_they_must():
    for skip, again in ((False, 0), (True, 3)):
        toy = Toy(skip).requires_grad_(False)
        prefix = Prefix(toy, calls(), BLOCKS)
        for block in BLOCKS[:2]:
            prefix.enter(block)
            prefix.leave()
        toy.ran.clear()
        prefix.enter(BLOCKS[2])
        assert toy.ran.count(0) == 2 * again  # in the model and in its copy, which share the list
        assert "forward" not in vars(toy.blocks[0])  # as it was


def test_the_copy_shares_what_is_float(toy):
    prefix = Prefix(toy, calls(), BLOCKS)
    assert prefix.seen.blocks[1] is not toy.blocks[1]
    assert prefix.seen.blocks[1][0].weight is toy.blocks[1][0].weight


def test_a_budget_bounds_the_calls_that_are_kept():
    """A block is given 2 * 5 * 8 fp32 = 320 bytes a call, and makes as many, in two models: 1280 of a quarter."""
    toy = Toy(False).requires_grad_(False)
    for budget, kept in ((4 * 1280 * 2, 2), (4 * 1280 * 3 - 1, 2), (1, 1), (None, 5)):
        prefix = Prefix(toy, calls(5), BLOCKS, budget)
        prefix.enter(BLOCKS[0])
        assert prefix.num_calls == kept
        assert torch.equal(
            prefix.rows("0").wanted[:10], calls(5)[0].args[0].reshape(-1, 8).double()
        )
