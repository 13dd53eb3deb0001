"""Roles of linears in a small module whose dataflow is known by construction."""

import pytest
import torch
from torch import nn

from ditq_converters.sites.reasons import why_float
from ditq_converters.sites.timestep import timestep_argument
from ditq_converters.sites.trace import trace
from ditq_converters.sites.usage import Usage

WIDTH, BATCH = 8, 2


class Sinusoid(nn.Module):
    def forward(self, t):
        return torch.cat(
            [torch.sin(t[:, None] * torch.arange(4)), torch.cos(t[:, None] * torch.arange(4))], -1
        )


class Model(nn.Module):
    """Tokens, an embedded timestep, a modulation, a router, a linear whose weight is read without a call."""

    def __init__(self):
        super().__init__()
        self.sinusoid = Sinusoid()
        names = ("embed_1", "embed_2", "down", "up", "query", "key", "route", "plain", "idle")
        for name in names:
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        self.coordinates = nn.Linear(1, WIDTH)

    def forward(self, tokens, time, positions, label=None):
        embedded = self.embed_2(nn.functional.silu(self.embed_1(self.sinusoid(time))))
        if label is not None:
            embedded = embedded + self.sinusoid(label)
        scale = self.up(self.down(nn.functional.silu(embedded)))
        turned = tokens * torch.cos(positions[:, None])
        buffer = torch.zeros_like(turned)
        buffer[:, 1:] = turned[:, 1:]  # written to through a view
        x = buffer * (1 + scale[:, None])
        chosen = self.route(x).softmax(-1).topk(2).indices
        x = self.query(x) + self.key(x) + nn.functional.linear(x, self.plain.weight)
        return x.gather(-1, chosen)


@pytest.fixture(scope="module")
def usage():
    inputs = {
        "tokens": torch.randn(BATCH, 3, WIDTH, dtype=torch.float64),
        "time": torch.tensor([0.1, 0.7], dtype=torch.float64),
        "positions": torch.arange(3, dtype=torch.float64),
    }
    torch.manual_seed(0)
    model = Model().double()
    return Usage(trace(model, inputs)[0], inputs)


def test_one_row_per_sample_and_what_embeds(usage):
    assert usage.batch == BATCH
    called = usage.graph.calls
    assert {n for n in called if usage.per_sample(n)} == {"embed_1", "embed_2", "down", "up"}
    assert {n for n in called if usage.per_sample(n) and usage.embeds(n)} == {"embed_1", "embed_2"}


def test_a_rewritten_tensor_depends_on_what_was_written(usage):
    (call,) = usage.graph.calls["query"]
    assert usage.depends[call.get("input")] == {"tokens", "time", "positions"}


def test_readers_of_the_same_tensor_are_the_same_value(usage):
    read = {name: usage.graph.calls[name][0].get("input") for name in ("query", "key", "route")}
    assert len(set(read.values())) == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("query", None),
        ("down", None),
        ("up", None),
        ("embed_1", "one row per sample"),
        ("route", "router"),
        ("plain", "without a call"),
        ("idle", "not read"),
    ],
)
def test_why_a_linear_stays_float(usage, name, why):
    found = why_float(usage, name, usage.graph.modules[name])
    assert found is None if why is None else why in found


def test_the_timestep_is_what_sines_embed(usage):
    assert timestep_argument(usage) == ("time", "")


@pytest.mark.parametrize(("scale", "expected"), [(0.0, None), (1.0, None)])
def test_several_or_no_timesteps_are_told(scale, expected):
    inputs = {
        "x": torch.randn(BATCH, 3, WIDTH),
        "time_a": torch.rand(BATCH),
        "time_b": torch.rand(BATCH),
    }

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.sinusoid, self.linear = Sinusoid(), nn.Linear(WIDTH, WIDTH).double()

        def forward(self, x, time_a, time_b):
            embed = (
                self.sinusoid(time_a - time_b)
                if scale
                else time_a[:, None].expand(-1, WIDTH).clone()
            )
            return x + self.linear(embed)[:, None]

    inputs = {name: value.double() for name, value in inputs.items()}
    argument, why = timestep_argument(Usage(trace(Two(), inputs)[0], inputs))
    assert argument is expected
    assert why == (
        "several arguments of its forward are timesteps: time_a, time_b"
        if scale
        else "no argument of its forward is embedded as a timestep"
    )
