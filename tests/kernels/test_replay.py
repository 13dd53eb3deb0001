"""Plans of Triton kernels, through Triton's own launcher over a driver that does nothing."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module", params=["90", "120"])
def report(request, python_without_interpreter):
    """Of one process, which compiles every kernel once for a target."""
    script = Path(__file__).with_name("replayed.py")
    return json.loads(python_without_interpreter(script, request.param))


def test_every_op_is_launched_by_its_plan_as_by_triton_itself(report):
    assert report["wrong"] == {}
    assert set(report["kinds"]) == {"LaunchPlan"}  # none fell back to a function


def test_addresses_of_another_kind_have_a_plan_of_their_own(report):
    assert report["addresses"] == {"plans": 2, "taken": [False, False, True, True, True]}


def test_two_arguments_in_one_place_are_not_told_apart(report):
    assert report["one_place"] == "FunctionPlan"
