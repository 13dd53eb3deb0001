"""Plans of Triton kernels, through Triton's own launcher over a driver that does nothing."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def report(python_without_interpreter):
    """Of one process, which compiles every kernel once."""
    return json.loads(python_without_interpreter(Path(__file__).with_name("replayed.py"), "90"))


def test_every_op_is_launched_by_its_plan_as_by_triton_itself(report):
    assert report["wrong"] == {}
    assert set(report["kinds"]) == {"LaunchPlan", "LayerPlans"}  # none fell back to a function


def test_plans_of_prepared_weights_live_and_change_with_them(report):
    assert report["prepared"] == {
        "counts": [1, 2, 2, 1],
        "changed": True,
        "inference": "FunctionPlan",
    }


def test_two_arguments_in_one_place_are_not_told_apart(report):
    assert report["one_place"] == "FunctionPlan"
