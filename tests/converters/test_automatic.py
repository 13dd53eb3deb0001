"""What `ditq convert` does where nobody chose a method: auto where it can calibrate, else what needs no data."""

import sys

import pytest
import torch
import typer

from ditq_converters import CalibrationStats, calibrate
from ditq_converters.auto.estimate import seconds_of
from ditq_converters.auto.search import ends
from ditq_converters.calibrate.errors import StatisticsError
from ditq_converters.cli import choices as c
from ditq_converters.cli.automatic import has_inputs
from ditq_converters.cli.choices import OLD, UNFED, settled
from ditq_converters.plan.make import plan_of

NOTHING = {
    name: tuple(default) if isinstance(default, list) else default
    for name, (_, default) in c.CHOICES.items()
}


def chosen(asked=False, fed=True, stats=None, **choices):
    return settled({**NOTHING, **choices}, asked, fed, stats)


def test_auto_is_the_default_in_the_bits_that_were_asked_for():
    eight, four = chosen(), chosen(weights="w4p")
    assert (eight.method, eight.weights, eight.rounding, eight.alpha) == (
        "osplus",
        "w8",
        "aimed",
        0.65,
    )
    assert (four.method, four.weights, four.rounding, four.alpha) == (
        "osplus",
        "w4p",
        "aimed",
        0.35,
    )
    assert chosen(budget="smallest").weights == "w4p"
    assert chosen(budget="largest").weights == "w8"
    assert four.kept_dtype == "bf16"
    assert chosen(kept_dtype="fp32", rounding="nearest", activations="token").rounding == "nearest"


def test_only_other_budgets_are_searched_for():
    asked = ("", "smallest", "largest", "40%", "2MiB")
    assert [c.searches({**NOTHING, "budget": budget}) for budget in asked] == [False] * 3 + [
        True
    ] * 2


def test_float_sites_are_searched_for_in_the_bits_that_were_asked_for(monkeypatch):
    """A search of whatever budget; another method has none."""
    assert c.searches({**NOTHING, "float_sites": 2})
    monkeypatch.setitem(
        vars(sys.modules["ditq_converters.auto.search"]), "auto_plan", lambda *a, **k: (a[2], k)
    )
    for choices, budget in (
        ({}, "largest"),
        ({"weights": "w4p"}, "smallest"),
        ({"budget": "9%"}, "9%"),
    ):
        assert c.searched({**NOTHING, "float_sites": 2, **choices}, None, None) == (
            budget,
            {"float_sites": 2},
        )
    with pytest.raises(typer.BadParameter, match="--float-sites is for --method auto"):
        chosen(asked=True, method="smoothquant", float_sites=1)


def test_another_method_is_as_it_was():
    other = chosen(asked=True, fed=False, method="smoothquant")
    assert (other.method, other.rounding, other.activations) == ("smoothquant", "nearest", "token")
    assert (other.kept_dtype, other.alpha) == ("fp32", 0.5)


def test_without_anything_to_calibrate_with_it_says_what_that_would_gain(capfd):
    free = chosen(fed=False, weights="w4p")
    assert UNFED in capfd.readouterr().err
    assert (free.method, free.group_size, free.rounding) == ("linear", 32, "nearest")
    assert chosen(fed=False, weights="w4p", group_size=128).group_size == 128
    assert (
        chosen(fed=False, asked=True).method == "osplus"
    )  # by name: calibration will say what it needs
    assert chosen(fed=False, budget="40%").method == "osplus"
    assert chosen(fed=False, float_sites=2).method == "osplus"


def test_classes_are_something_to_calibrate_with(make_pipeline, make_dit):
    nothing = {"inputs": None, "prompts": None}
    assert has_inputs(make_pipeline(), nothing)
    assert has_inputs(make_dit(), nothing)
    assert not has_inputs(torch.nn.Linear(1, 1), nothing)
    assert has_inputs(torch.nn.Linear(1, 1), {**nothing, "prompts": "a.txt"})


def test_statistics_without_rows_are_still_good_for_smoothing(capfd):
    class Old:
        has_replay = False

    assert chosen(stats=Old()).method == "smoothquant"
    assert OLD in capfd.readouterr().err


@pytest.fixture(scope="module")
def calibrated(make_dit, tmp_path_factory):
    model = make_dit(2)
    folder = tmp_path_factory.mktemp("stats") / "stats"
    return model, calibrate(model, out=folder, steps=2, samples=2, rows=8, quiet=True)


def test_an_estimate_grows_with_what_is_asked_for(calibrated):
    model, stats = calibrated
    assert CalibrationStats.open(stats.folder).has_replay
    low = ends(model).low
    nearest = plan_of(model, chosen(method="linear", asked=True))
    rounded = plan_of(model, chosen(rounding="gptq"))
    assert seconds_of(nearest, model, stats, False) == 0
    plain, aimed, searched = (
        seconds_of(plan, model, stats, flag)
        for plan, flag in ((rounded, False), (low, False), (low, True))
    )
    assert plain > 0
    assert 0 < aimed < 300  # of two blocks, 64 wide
    assert aimed < searched


def test_calls_of_another_model_are_not_replayed(calibrated, make_dit):
    """To see how long they take; nobody could tell what they would do."""
    _, stats = calibrated
    other = make_dit(1)
    with pytest.raises(StatisticsError, match="belong to another model"):
        seconds_of(ends(other).low, other, stats, False)
