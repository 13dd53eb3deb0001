"""Bits for a budget: what a text means in bytes, and which linears take 8 bits."""

import pytest
import torch

from ditq_converters import calibrate, convert
from ditq_converters.auto.budget import float_bytes, linear_bytes, parse_budget
from ditq_converters.auto.search import Ladder, Unit, auto_plan, climb, ends
from ditq_converters.plan.entries import LinearPlan


@pytest.fixture(scope="module")
def model(make_dit):
    return make_dit(2)


@pytest.fixture(scope="module")
def stats(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stats") / "stats"
    return calibrate(model, out=folder, steps=4, samples=2, rows=32, quiet=True)


@pytest.fixture(scope="module")
def ladder(model, stats):
    return climb(model, stats, quiet=True)


def test_what_a_budget_means(model):
    total = float_bytes(model)
    assert parse_budget("25%", model) == round(total / 4)
    assert parse_budget("1.5MiB", model) == 3 * 2**19
    assert parse_budget("2 kb", model) == 2000
    assert parse_budget("smallest", model) == 0
    assert parse_budget("largest", model) is None


@pytest.mark.parametrize(
    "text", ["much", "", "1.2.3MB", "12 parsecs", "-3MB", "-5%", "nan%", "inf%", "%"]
)
def test_other_texts_are_refused(model, text):
    with pytest.raises(ValueError, match=r"--budget must be a share as 45%, a size as 1.9MiB"):
        parse_budget(text, model)


def test_bytes_of_a_linear_by_hand():
    """w8 [8, 64]: 512 codes, 8 scales of 4 bytes, 8 biases; w4p in two groups: 256, 32, 16 + 16 bytes, biases."""
    eight = LinearPlan("a", (8, 64), "b.s", "w8", "token")
    four = LinearPlan("a", (8, 64), "b.s", "w4p", "token", 32)
    assert linear_bytes(eight, bias=True) == 512 + 32 + 32
    assert linear_bytes(eight, bias=False) == 512 + 32
    assert linear_bytes(four, bias=True) == 256 + 32 + 32 + 32


def unit(name, gain, cost):
    return Unit(name, (LinearPlan(f"{name}.x", (8, 64), name, "w8", "token"),), cost), gain


def test_bytes_go_where_they_gain_most(model):
    """Per byte b > a > c; d makes it worse. 100 bytes take b and a; 60 take b alone, and c fills what is left."""
    found = [unit("a", 0.2, 50), unit("b", 0.3, 40), unit("c", 0.01, 20), unit("d", -0.1, 1)]
    low = tuple(LinearPlan(f"{n}.x", (8, 64), n, "w4p", "token", 32) for n in "abcd")
    plan = ends(model, None, {}).low
    plan = type(plan)(plan.architecture, (), low)
    gains = {one.name: gain for one, gain in found}
    ladder = Ladder(plan, plan, tuple(one for one, _ in found), gains, 1000)

    def taken(most):
        return [entry.name[0] for entry in ladder.plan(most).linears if entry.weights == "w8"]

    assert taken(1100) == ["a", "b"]
    assert taken(1060) == ["b", "c"]
    assert taken(1010) == []
    assert taken(900) == []
    assert "8 take away 30.0% of the noise for 40 bytes" in ladder.plan(1100).linears[1].reason


def test_more_bytes_are_never_worse(model, stats, ladder):
    """No budget is exceeded, and more of it is used; the units together make up for most of the noise of 4 bits."""
    sizes = []
    for share in (0, 0.5, 1):
        most = ladder.nbytes + round(share * sum(one.cost for one in ladder.units))
        packed = convert(model, ladder.plan(most if share else 0), stats, quiet=True)
        tensors = {id(t): t for t in (*packed.parameters(), *packed.buffers())}.values()
        sizes.append(sum(t.numel() * t.element_size() for t in tensors))
        assert sizes[-1] <= most
    assert sizes == sorted(set(sizes))
    assert all(gain < 1 for gain in ladder.gains.values())
    # 8 bits of everything take away nearly all: a code of 4 bits is 16 times as coarse
    assert sum(ladder.gains.values()) > 0.5


def test_every_unit_can_take_8_bits(model, ladder):
    names = [name for one in ladder.units for name in one.linears]
    assert len(names) == len(set(names))
    quantized = {entry.name for entry in ladder.low.linears if entry.weights == "w4p"}
    assert set(names) == quantized
    assert all(one.cost > 0 for one in ladder.units)


def test_the_ends_need_no_search(model, stats):
    low, high = (auto_plan(model, stats, name, quiet=True) for name in ("smallest", "largest"))
    assert {entry.weights for entry in low.linears if entry.is_integer} == {"w4p"}
    assert {entry.weights for entry in high.linears if entry.is_integer} == {"w8"}
    assert {entry.activations for entry in low.linears if entry.is_integer} == {"token_asym"}


def test_aimed_rounding_lowers_the_error_of_the_model(model, stats):
    """On the calls that it aims at: the same scales, bytes and transforms, only the codes and biases differ."""
    low = ends(model, None, {"kept_dtype": "fp32"}).low
    calls = list(stats.replay())

    def error(plan):
        packed = convert(model, plan, stats, quiet=True)
        return sum(
            float((call.replay(packed) - call.replay(model)).square().sum()) for call in calls
        )

    plain = ends(model, None, {"kept_dtype": "fp32", "rounding": "gptq"}).low
    nearest = {"kept_dtype": "fp32", "rounding": "nearest", "bias_correction": False}
    assert error(low) < error(plain) < error(ends(model, None, nearest).low)
    assert torch.isfinite(torch.tensor(error(low)))
