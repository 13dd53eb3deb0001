"""What a linear is rounded to behind quantized layers: against a solver, and judged on rows it was not fitted to."""

import pytest
import torch

from ditq_converters.convert.target import DAMPINGS, aimed, best_damping


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_aimed_weight_is_the_damped_least_squares_solution(damping):
    """Against a solver on the stacked problem [X'; sqrt(lambda) I] V^T = [X W^T; sqrt(lambda) W^T]."""
    wanted, weight = normal(120, 24), normal(5, 24, seed=1)
    seen = wanted + 0.2 * normal(120, 24, seed=3)
    root = (damping * float(seen.square().sum(0).mean())) ** 0.5 * torch.eye(24).double()
    solved = torch.linalg.lstsq(
        torch.cat([seen, root]), torch.cat([wanted @ weight.T, root @ weight.T])
    ).solution.T
    # condition of the damped problem below 1e4, squared by the normal equations: 1e8 * 2^-53 is 1e-8
    torch.testing.assert_close(aimed(weight, wanted, seen, damping), solved, rtol=0, atol=1e-7)
    unchanged = aimed(weight, wanted, wanted, damping)
    torch.testing.assert_close(unchanged, weight, rtol=0, atol=1e-12)


def test_without_bound_nothing_changes():
    wanted, weight = normal(120, 24), normal(5, 24, seed=1)
    assert torch.equal(aimed(weight, wanted, 2 * wanted, None), weight)


def test_what_follows_from_the_input_is_taken_and_noise_is_not():
    """Inputs that come 20 % too large in every row call for weights of 1 / 1.2, with little damping.

    Noise on 60 rows of 24 channels says nothing about other rows: what is fitted to it makes those worse.
    """
    wanted, weight = normal(120, 24), normal(5, 24, seed=1)
    half = torch.arange(120) % 2 == 1
    assert best_damping(weight, wanted, 1.2 * wanted, half) == min(DAMPINGS)
    noisy = wanted + 0.01 * normal(120, 24, seed=3)
    chosen = best_damping(weight, wanted, noisy, half)
    assert chosen is None or chosen > min(DAMPINGS)
