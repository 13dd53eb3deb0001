"""The methods' formulas against hand-worked numbers and numpy."""

import numpy as np
import pytest
import torch

from ditq_converters.methods import METHODS, SiteData
from ditq_converters.methods.smoothquant import SmoothQuantOptions


def smooth(site, alpha):
    """The factor smoothquant gives one site; it groups no timesteps and shifts nothing."""
    choice = METHODS["smoothquant"].transform([site], SmoothQuantOptions(alpha=alpha))
    assert choice.num_groups == 1
    assert choice.sites["fc1"].shift is None
    return choice.sites["fc1"].smooth


def random_site(calls=7, width=33, seed=0):
    rng = np.random.default_rng(seed)
    low = -rng.lognormal(0, 1.5, (calls, width)).astype(np.float32)
    high = rng.lognormal(0, 1.5, (calls, width)).astype(np.float32)
    weight = rng.lognormal(-3, 1, width)
    return low, high, weight


def as_site(low, high, weight):
    # two rows whose largest magnitude per column is `weight`
    stacked = torch.from_numpy(np.stack([0.5 * weight, -weight]))
    return SiteData("fc1", torch.from_numpy(low), torch.from_numpy(high), stacked)


def test_smoothquant_by_hand():
    """a = max(|-4|, 1, 2, 16) = 16, w = 1/4; s = 16^(3/4) / (1/4)^(1/4) = 8 / 0.70711 = 8 sqrt 2."""
    site = SiteData(
        "fc1",
        torch.tensor([[-4.0], [-1.0]]),
        torch.tensor([[2.0], [16.0]]),
        torch.tensor([[0.25]], dtype=torch.float64),
    )
    s = smooth(site, 0.75)
    assert s.dtype == torch.float64
    torch.testing.assert_close(s, torch.tensor([8 * 2**0.5], dtype=torch.float64))


def test_the_minimum_counts_as_much_as_the_maximum():
    site = SiteData(
        "fc1",
        torch.tensor([[-9.0, 0.0]]),
        torch.tensor([[1.0, 9.0]]),
        torch.ones(1, 2, dtype=torch.float64),
    )
    assert smooth(site, 0.5).tolist() == [3.0, 3.0]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_equals_numpy(alpha):
    low, high, weight = random_site()
    a = np.maximum(np.abs(low), np.abs(high)).astype(np.float64).max(axis=0)
    expected = np.exp(alpha * np.log(a) - (1 - alpha) * np.log(weight))
    # exp, log and pow are within an ulp or two, on exponents below 10
    np.testing.assert_allclose(
        smooth(as_site(low, high, weight), alpha).numpy(), expected, rtol=1e-13
    )


def test_the_ends_of_alpha():
    low, high, weight = random_site()
    site = as_site(low, high, weight)
    torch.testing.assert_close(smooth(site, 0.0), 1 / site.weight_absmax, rtol=1e-15, atol=0)
    torch.testing.assert_close(smooth(site, 1.0), site.absmax.amax(0), rtol=1e-15, atol=0)


def test_half_way_balances_activations_and_weights():
    low, high, weight = random_site(width=500)
    site = as_site(low, high, weight)
    s = smooth(site, 0.5)
    torch.testing.assert_close(site.absmax.amax(0) / s, site.weight_absmax * s, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("absmax", "weight", "alpha", "expected"),
    [
        (0.0, 1.0, 1.0, 1e-4),  # guarded to 1e-5, then clamped
        (0.0, 1.0, 0.5, 1e-5**0.5),  # guarded, inside the clamp
        (1.0, 0.0, 0.5, 1e-5**-0.5),
        (1.0, 0.0, 0.0, 1e4),  # guarded to 1e-5, so 1e5, then clamped
        (1e12, 1e-3, 0.5, 1e4),
        (0.0, 0.0, 0.5, 1.0),  # a dead channel keeps its scale
    ],
)
def test_guards_and_clamps(absmax, weight, alpha, expected):
    site = SiteData(
        "fc1",
        torch.tensor([[-absmax]]),
        torch.tensor([[0.0]]),
        torch.tensor([[weight]], dtype=torch.float64),
    )
    # fp32 statistics: 1e12 and 0 are not exact powers, but both end at a guard or a clamp
    np.testing.assert_allclose(smooth(site, alpha).item(), expected, rtol=1e-12)


def test_linear_has_no_transform():
    assert METHODS["linear"].transform is None
    assert not METHODS["linear"].needs_statistics
    assert METHODS["smoothquant"].needs_statistics


def test_methods_are_listed_by_their_name():
    assert {"linear", "smoothquant"} <= set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.source
