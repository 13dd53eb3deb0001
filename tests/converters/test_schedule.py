"""Timesteps of several runs on one axis, and seeds from counters."""

import pytest
import torch

from ditq_converters.calibrate.schedule import schedule_of
from ditq_runtime.calls.seeds import generator, splitmix64


def test_equal_runs_keep_their_timesteps():
    schedule = schedule_of([[900.0, 500.0, 0.0]] * 3)
    assert schedule.timesteps == (900.0, 500.0, 0.0)
    assert [schedule.bin_of[t] for t in (0.0, 500.0, 900.0)] == [2, 1, 0]


def test_a_timestep_that_rises_while_noise_falls():
    """Some models are told 1 - t: the first call is the noisiest all the same."""
    schedule = schedule_of([[0.0, 0.4, 0.9], [0.0, 0.4, 0.9]])
    assert schedule.timesteps == (0.0, 0.4, 0.9)


def test_calls_at_one_timestep_are_one():
    """Guidance in two calls, and a second-order sampler that comes back."""
    assert schedule_of([[8.0, 8.0, 5.0, 8.0, 1.0]]).timesteps == (8.0, 5.0, 1.0)


def test_unlike_runs_share_bins_of_neighbours_in_noise():
    """7 timesteps in the 4 bins of the longest run: 1, 2, 2 and 2 of them, by hand."""
    schedule = schedule_of([[900.0, 600.0, 300.0, 0.0], [950.0, 500.0, 50.0]])
    assert schedule.timesteps == (950.0, 750.0, 400.0, 25.0)
    members = [[t for t, index in schedule.bin_of.items() if index == i] for i in range(4)]
    assert members == [[950.0], [900.0, 600.0], [500.0, 300.0], [50.0, 0.0]]


def test_a_run_that_begins_late_adds_no_bins():
    """Image-to-image at strength 0.5 beside whole runs."""
    assert schedule_of([[900.0, 600.0, 300.0, 0.0], [300.0, 0.0]]).timesteps == (
        900.0, 600.0, 300.0, 0.0,
    )  # fmt: skip


def test_splitmix64_is_the_published_one():
    """First output for seed 0, as in Vigna's splitmix64.c: e220a8397b1dcdaf; 63 bits of it are kept."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF >> 1


@pytest.mark.parametrize("other", [(1, 0), (0, 1), (0,), (0, 0, 0)])
def test_counters_decide_the_noise(other):
    assert torch.equal(
        torch.randn(4, generator=generator(0, 0)), torch.randn(4, generator=generator(0, 0))
    )
    assert not torch.equal(
        torch.randn(4, generator=generator(0, 0)), torch.randn(4, generator=generator(*other))
    )
