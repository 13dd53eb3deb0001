"""Bits for a budget: what a text means in bytes, and which linears take 8 bits."""

import re
import sys
from itertools import product

import pytest
import torch

from ditq_converters import Recipe, calibrate, convert
from ditq_converters.auto.budget import float_bytes, parse_budget
from ditq_converters.auto.ladder import Choice, Unit, best_choices
from ditq_converters.auto.search import auto_plan, best, climb, ends, noise
from ditq_converters.convert.classes import ask_all_classes
from ditq_converters.plan.entries import LinearPlan
from ditq_converters.plan.make import plan_of
from ditq_converters.plan.sizes import linear_bytes
from ditq_converters.streaming.opening import open_in_pieces
from ditq_runtime.format.folder import open_folder


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


def unit(name, *choices):
    """A unit of one linear, in groups of 64, then as (gain, cost) say: in groups of 32 and in 8 bits."""
    shape, forms = (8, 64), (("w4p", 64), ("w4p", 32), ("w8", None))
    forms = (forms[0], *forms[-len(choices) :])
    return Unit(
        name,
        tuple(
            Choice((LinearPlan(f"{name}.x", shape, name, weights, "token", group),), cost, gain)
            for (weights, group), (gain, cost) in zip(forms, ((0.0, 0), *choices), strict=True)
        ),
    )


def test_bytes_go_where_they_gain_most():
    """100 bytes: b and a; 60: b and c, which together gain more than a; d makes it worse at any price."""
    units = (unit("a", (0.2, 50)), unit("b", (0.3, 40)), unit("c", (0.01, 20)), unit("d", (-1, 1)))
    assert best_choices(units, 100) == [1, 1, 0, 0]
    assert best_choices(units, 60) == [0, 1, 1, 0]
    assert best_choices(units, 10) == [0, 0, 0, 0]
    assert best_choices(units, 10**9) == [1, 1, 1, 0]


def test_small_steps_where_large_ones_do_not_fit():
    """Groups of 32 of both for 20 bytes, 8 bits of a for 50, of both for 100."""
    units = (unit("a", (0.1, 10), (0.4, 50)), unit("b", (0.1, 10), (0.3, 50)))
    assert best_choices(units, 9) == [0, 0]
    assert best_choices(units, 20) == [1, 1]
    assert best_choices(units, 50) == [2, 0]
    assert best_choices(units, 60) == [2, 1]
    assert best_choices(units, 100) == [2, 2]


def test_more_room_never_gains_less():
    """Against all choices tried, where no cost is rounded; the frontier of gains over bytes never falls."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(6, 2, generator=generator).tolist()
    costs = torch.randint(1, 30, (6, 2), generator=generator).tolist()
    units = tuple(
        unit(f"u{i}", (gain[0] - 0.2, cost[0]), (gain[1], cost[0] + cost[1]))
        for i, (gain, cost) in enumerate(zip(drawn, costs, strict=True))
    )
    frontier = []
    for room in range(0, 190, 5):
        chosen = best_choices(units, room)
        taken = [u.choices[i] for u, i in zip(units, chosen, strict=True)]
        assert sum(choice.cost for choice in taken) <= room
        frontier.append(sum(choice.gain for choice in taken))
        best = max(
            sum(choice.gain for choice in tried)
            for tried in product(*(u.choices for u in units))
            if sum(choice.cost for choice in tried) <= room
        )
        assert frontier[-1] == pytest.approx(best, abs=1e-12)
    assert frontier == sorted(frontier)


def test_a_budget_that_nothing_fits_into_is_refused(ladder):
    with pytest.raises(
        ValueError, match=f"the smallest checkpoint of this model has {ladder.nbytes:,}"
    ):
        ladder.plan(ladder.nbytes - 1)


def test_it_is_refused_before_anything_is_tried(model, stats, monkeypatch):
    monkeypatch.setattr(
        "ditq_converters.auto.search.progress_bar", None
    )  # what tries would call it
    with pytest.raises(ValueError, match=r"^--budget: 1,000 bytes are too few, the smallest"):
        auto_plan(model, stats, "1kB", quiet=True)


def test_an_output_of_zeros_counts_by_what_is_found():
    zeros, ones = torch.zeros(2, 2), torch.ones(2, 2)
    assert noise([zeros, ones], [zeros, ones]) == 0
    assert noise([zeros, ones], [ones, zeros]) == (4 + 1) / 2


def test_more_bytes_are_never_worse(model, stats, ladder, tmp_path):
    """No budget is exceeded by the file, and more of it is used; neither gains nor what the files give ever fall."""
    sizes, gains, errors = [], [], []
    calls = list(stats.replay())
    wanted = [call.replay(model) for call in calls]
    room = sum(one.choices[-1].cost for one in ladder.units)
    for share in (0, 0.1, 0.5, 1):
        most = ladder.nbytes + round(share * room)
        out = tmp_path / str(share)
        convert(model, ladder.plan(most if share else 0), stats, out, quiet=True)
        packed = type(model).from_pretrained(out, torch_dtype=torch.float32)
        errors.append(noise(wanted, [call.replay(packed) for call in calls]))
        sizes.append(open_folder(out).nbytes)
        assert sizes[-1] <= most
        chosen = best_choices(ladder.units, most - ladder.nbytes)
        gains.append(sum(u.choices[i].gain for u, i in zip(ladder.units, chosen, strict=True)))
    assert sizes == sorted(set(sizes))
    assert gains == sorted(gains)
    assert errors == sorted(errors, reverse=True)
    assert ladder.nbytes - sizes[0] < 0.01 * sizes[0]
    assert all(choice.gain < 1 for one in ladder.units for choice in one.choices)
    # 8 bits of everything take away nearly all: a code of 4 bits is 16 times as coarse
    assert gains[-1] > 0.5


def test_every_unit_can_be_stored_in_three_ways(model, ladder):
    names = [name for one in ladder.units for name in one.linears]
    assert len(names) == len(set(names))
    quantized = {entry.name for entry in ladder.low.linears if entry.weights == "w4p"}
    assert set(names) == quantized
    for one in ladder.units:
        forms = [
            (choice.entries[0].weights, choice.entries[0].group_size) for choice in one.choices
        ]
        assert forms == [("w4p", 64), ("w4p", 32), ("w8", None)]
        alphas = {choice.site.options.get("alpha") for choice in one.choices if choice.site}
        assert alphas in (set(), {0.35, 0.65})
        costs = [choice.cost for choice in one.choices]
        assert costs == sorted(set(costs))


def test_a_plan_says_what_was_chosen_and_what_is_next():
    some = unit("a", (0.1, 10), (0.4, 50))
    small, eight = (some.entries(i)[0].reason for i in (1, 2))
    assert small == (
        "auto: 4 bits in groups of 32, take away 10.0% of the noise for 10 bytes; "
        "8 bits would take away 40.0% of the noise for 50 bytes"
    )
    assert eight == "auto: 8 bits, take away 40.0% of the noise for 50 bytes"


def test_a_budget_is_searched_with_the_weights_on_disk(model, stats, ladder, tmp_path):
    """The same choices, gains and bytes; refused where the model in 4 and in 8 bits does not fit."""
    model.save_pretrained(tmp_path / "float")
    assert climb(open_in_pieces(tmp_path / "float", 2**40), stats, quiet=True) == ladder
    with pytest.raises(ValueError, match="a search for a --budget holds the model in 4 and in 8"):
        climb(open_in_pieces(tmp_path / "float", 2**20), stats, quiet=True)


def test_the_ends_need_no_search(model, stats):
    low, high = (auto_plan(model, stats, name, quiet=True) for name in ("smallest", "largest"))
    assert {entry.weights for entry in low.linears if entry.is_integer} == {"w4p"}
    assert {entry.weights for entry in high.linears if entry.is_integer} == {"w8"}
    assert {entry.activations for entry in low.linears if entry.is_integer} == {"token_asym"}
    assert {site.options["alpha"] for site in high.sites} == {0.65}
    asked = auto_plan(model, stats, "largest", quiet=True, alpha=0.3)
    assert {site.options["alpha"] for site in asked.sites} == {0.3}


def test_aimed_rounding_lowers_the_error_of_the_model(model, stats):
    """On the calls that it aims at: the same scales, bytes and transforms, only the codes and biases differ."""
    low = ends(model, kept_dtype="fp32").low
    calls = ask_all_classes(model, list(stats.replay()))

    def error(plan):
        packed = convert(model, plan, stats, quiet=True)
        return sum(
            float((call.replay(packed) - call.replay(model)).square().sum()) for call in calls
        )

    plain = ends(model, kept_dtype="fp32", rounding="gptq").low
    nearest = {"kept_dtype": "fp32", "rounding": "nearest", "bias_correction": False}
    assert error(low) < error(plain) < error(ends(model, **nearest).low)
    assert torch.isfinite(torch.tensor(error(low)))


def test_the_readers_of_some_sites_keep_float_activations(model, stats):
    """By three rules each: nothing is left there but the rounding of 8-bit weights."""
    rules = ("activations=none", "rounding=nearest", "bias_correction=false")
    last = [f"transformer_blocks.1.ff.net.2:{rule}" for rule in rules]
    recipe = Recipe.of(**{**best("w8"), "kept_dtype": "fp32"})
    both = plan_of(model, recipe), plan_of(model, recipe, last)
    calls = list(stats.replay())
    wanted = [call.replay(model) for call in calls]
    errors = []
    for plan in both:
        packed = convert(model, plan, stats, quiet=True)
        errors.append(noise(wanted, [call.replay(packed) for call in calls]))
    assert errors[1] < errors[0]
    layer = packed.get_submodule("transformer_blocks.1.ff.net.2")
    assert (layer.format.weights, layer.format.activations) == ("w8", "none")


def test_auto_finds_sites_for_float_activations(model, stats, ladder, tmp_path, monkeypatch):
    """They lower the error, a plan says what they gain and cost, and a budget is kept."""
    plain, freed = (
        auto_plan(model, stats, "largest", quiet=True, float_sites=number, kept_dtype="fp32")
        for number in (0, 2)
    )
    known = {entry.name: entry for entry in plain.linears}
    free = [
        entry for entry in freed.linears if known[entry.name].is_integer and not entry.is_integer
    ]
    assert len({entry.site for entry in free}) == 2
    for entry in free:
        assert (entry.weights, entry.rounding, entry.bias_correction) == ("w8", "nearest", False)
        told = r"auto: float activations of its site, take away [\d.]+% of the noise; [\d.]+% of the products of blocks"
        assert re.match(told, entry.reason)
    calls = list(stats.replay())
    wanted = [call.replay(model) for call in calls]
    errors = []
    for plan in (plain, freed):
        packed = convert(model, plan, stats, quiet=True)
        errors.append(noise(wanted, [call.replay(packed) for call in calls]))
    assert errors[1] < errors[0]
    most = ladder.nbytes + sum(one.choices[-1].cost for one in ladder.units) // 2
    monkeypatch.setitem(vars(sys.modules[climb.__module__]), "climb", lambda *_, **__: ladder)
    small = auto_plan(model, stats, f"{most}B", quiet=True, float_sites=1)
    convert(model, small, stats, tmp_path / "out", quiet=True)
    assert open_folder(tmp_path / "out").nbytes <= most
    assert sum(entry.reason.startswith("auto: float") for entry in small.linears) >= 1
