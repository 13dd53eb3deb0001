"""Machine code of every kernel holds with the newest Triton release that is supported."""

import pytest

from ditq_bench.census.rows import gated_targets, kernel_names


@pytest.fixture(scope="module")
def report(gate_with, triton_releases):
    """Of one process; minutes of compiling if all sources changed."""
    return gate_with(triton_releases[-1])


@pytest.mark.parametrize("kernel", kernel_names())
def test_machine_code_is_sound(report, kernel):
    assert [fault for fault in report["faults"] if fault.startswith(f"{kernel} on ")] == []


def test_nothing_was_left_out(report, triton_releases):
    assert report["triton"] == triton_releases[-1]
    assert {row["kernel"] for row in report["rows"]} == set(kernel_names())
    targets = {row["target"] for row in report["rows"] if row["kernel"] == "gemm_w8a8"}
    assert targets == set(gated_targets(report["triton"]))


def test_a_part_of_what_is_known_is_compiled(report):
    """One of 16 launches, of hundreds: none at one commit in 30 million."""
    assert 0 < report["compiled"] <= len(report["rows"])
