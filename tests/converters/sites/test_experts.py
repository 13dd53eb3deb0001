"""Experts, routers and gates of a small mixture, told without a look at their names."""

import pytest
import torch
from torch import nn

from ditq_bench.zoo import CLASSES
from ditq_converters import convert, make_plan
from ditq_converters.cli.inspect import inspect_float
from ditq_converters.sites import experts
from ditq_converters.sites.experts import expert_parameters, gates, routes
from ditq_converters.sites.trace import trace
from ditq_converters.sites.usage import Usage
from ditq_runtime import execution_report

WIDTH, EXPERTS = 32, 3


class Mixture(nn.Module):
    """`a` routes, `b` gates every token, `c` is an ordinary linear, `d` ends in another linear; names tell nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 1)
        self.c, self.d, self.e = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)
        self.weights = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.table = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        chosen = self.a(x).softmax(-1).topk(1).indices[..., 0]
        y = self.table + self.conv(x.transpose(1, 2)).transpose(1, 2)
        for expert in range(EXPERTS):
            y = y + (chosen == expert)[..., None] * (x @ self.weights[expert])
        return y * torch.sigmoid(self.b(x)) + self.c(x) + self.e(self.d(x))


@pytest.fixture(scope="module")
def usage():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, WIDTH).double()}
    return Usage(trace(Mixture().double(), inputs)[0], inputs)


def test_a_router_is_what_a_choice_reads(usage):
    assert [name for name in "abcde" if routes(usage, name)] == ["a"]


def test_a_gate_makes_few_numbers_that_multiply(usage):
    """`d` makes two of 32 as well, but for a linear."""
    assert [name for name in "bcd" if gates(usage, name)] == ["b"]


def test_rows_that_a_router_picks_stand_by_no_sample():
    """What comes back to its place does again."""

    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in "abc")

        def forward(self, x):
            rows = x.flatten(0, 1)
            mine = self.a(rows)[:, 0] > 0
            back = torch.zeros_like(rows)
            back[mine] = self.b(rows[mine])
            return self.c(back)

    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, WIDTH).double()}
    usage = Usage(trace(Picked().double(), inputs)[0], inputs)
    read = {name: calls[0].get("input") for name, calls in usage.graph.calls.items()}
    assert {name: usage.scattered[v] for name, v in read.items()} == {
        "a": False,
        "b": True,
        "c": False,
    }


def test_experts_are_matrices_in_one_parameter(usage):
    """Neither a table that is added nor a convolution, three dimensions though they have."""
    assert expert_parameters(usage) == ["weights"]


def test_experts_are_counted_and_named_where_a_plan_is_shown_and_where_it_runs():
    tiny = CLASSES["NucleusMoEImageTransformer2DModel"]
    model = tiny.build().requires_grad_(False)
    inputs = tiny.inputs(model)
    held = {n: p.numel() for n, p in model.named_parameters() if ".experts." in n}
    assert sum(held.values()) > 0.2 * sum(p.numel() for p in model.parameters())
    plan = make_plan(model, inputs=inputs, method="linear")
    shown = inspect_float(model, plan)["others"]
    assert {entry["name"]: entry["parameters"] for entry in shown} == held
    assert {entry["reason"] for entry in shown} == {experts.EXPERTS}
    report = execution_report(convert(model, plan, quiet=True, inputs=inputs), inputs)
    assert report.experts == held
    assert report.totals["expert_parameters"] == sum(held.values())
    told = " ".join(str(report).split())
    assert all(f"{name} no linear: {count} parameters" in told for name, count in held.items())
