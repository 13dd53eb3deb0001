"""Choices that are refused before torch is imported are those that a recipe refuses; no other method's are lost."""

import pytest
import typer

from ditq_converters import Recipe
from ditq_converters.cli.choices import CHOICES, recipe_of
from ditq_converters.cli.convert import _next_step
from ditq_converters.cli.refusals import OF_METHODS, VALUES, check_values
from ditq_converters.methods import METHODS
from ditq_converters.plan import entries, plan, recipe

DEFAULTS = {name: default for name, (_, default) in CHOICES.items()} | {"keep": ()}
KNOWN = {
    "weights": entries.QUANTIZED, "activations": recipe.ACTIVATIONS, "modulation": entries.QUANTIZED,
    "modulation_activations": entries.ACTIVATIONS, "attention": recipe.ATTENTION, "attention_scales": recipe.SCALES,
    "kept_dtype": plan.KEPT_DTYPES, "rounding": entries.ROUNDINGS, "range_method": recipe.RANGE_METHODS,
    "weight_range_method": entries.WEIGHT_RANGES,
}  # fmt: skip


def test_the_quick_answer_knows_what_a_recipe_knows():
    assert {name: set(values) for name, values in VALUES.items()} == {
        name: set(values) for name, values in KNOWN.items()
    }


@pytest.mark.parametrize("name", ["method", *VALUES])
def test_a_value_that_a_recipe_refuses_is_refused(name):
    with pytest.raises(typer.BadParameter, match=f"--{name.replace('_', '-')} must be one of"):
        check_values({**DEFAULTS, name: "w5"})
    with pytest.raises(ValueError, match=name):
        Recipe(**{name: "w5"})
    check_values(DEFAULTS)


def test_every_option_of_a_method_is_known():
    own = {name for method in METHODS.values() for name in method.option_names}
    assert own & set(CHOICES) == set(OF_METHODS)


@pytest.mark.parametrize("method", ["linear", "smoothquant", "osplus", "meta", "ditas", "htg"])
def test_a_choice_of_another_method_is_refused_and_an_own_one_taken(method):
    others = {"alpha": 0.4, "num_groups": 3, "search": False, "ssc": False, "ema": 0.9}
    for name, value in others.items():
        choices = {**DEFAULTS, "method": method, name: value}
        if name in METHODS[method].option_names:
            assert getattr(recipe_of(choices), name) == value
        else:
            with pytest.raises(typer.BadParameter, match=f"the method is {method}"):
                recipe_of(choices)


def test_a_next_step_can_be_pasted(tmp_path):
    out = tmp_path / "Größe 2"
    out.mkdir()
    (out / "model_index.json").touch()
    assert f"`ditq sample '{out}' --prompt" in _next_step(out, None)
