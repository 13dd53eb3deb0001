"""The documented numbers of kernels are those that the dispatcher shows."""

from pathlib import Path

import torch

from ditq_bench.launches import RECIPES, Launches, table


def test_the_documented_table_is_what_runs():
    documented = (Path(__file__).parents[2] / "docs" / "performance_blocks.md").read_text()
    lines = table()
    assert len(lines) == 2 + 2 * len(RECIPES)  # DiT and PixArt
    assert "\n".join(lines) in documented


def test_views_and_memory_are_no_kernels():
    x = torch.ones(4, 6)
    with Launches() as counted:
        y = x.view(6, 4).t()[1:]
        torch.empty(3)
        torch.promote_types(torch.int8, torch.float32)
        assert counted.ops.total() == 0
        y.contiguous()
        (x @ x.t()).relu_()
    assert counted.ops == {"aten.clone": 1, "aten.mm": 1, "aten.relu_": 1}
