"""PTQ4DiT against scipy and hand-worked numbers."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from ditq_converters.methods import SiteData
from ditq_converters.methods.ptq4dit import (
    PTQ4DIT,
    Ptq4ditOptions,
    aggregate,
    average_ranks,
    calibration_calls,
    call_weights,
    spearman,
)
from ditq_converters.methods.smoothquant import SMOOTHQUANT, SmoothQuantOptions


def as_site(salience, weight, name="qkv", **flags):
    """Statistics whose larger end is the salience, on alternating sides."""
    salience = torch.as_tensor(salience, dtype=torch.float32)
    flip = torch.arange(salience.shape[1]) % 2 == 0
    low = torch.where(flip, -salience, -salience / 4)
    high = torch.where(flip, salience / 4, salience)
    return SiteData(name, low, high, torch.as_tensor(weight, dtype=torch.float64), **flags)


def random_site(calls=12, width=40, seed=0, **flags):
    rng = np.random.default_rng(seed)
    return as_site(rng.lognormal(0, 1.5, (calls, width)), rng.normal(size=(7, width)), **flags)


def with_ties(seed, calls=6, width=50):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 12, (calls, width)).astype(float), rng.integers(0, 9, width).astype(
        float
    )


def test_ranks_by_hand():
    values = torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert average_ranks(values).tolist() == [[4.0, 1.0, 4.0, 2.0, 4.0], [3.0] * 5]


@pytest.mark.parity("P16")
@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_spearman_equal_scipy(seed):
    x, w = with_ties(seed)
    x[0] = np.random.default_rng(seed).normal(size=50)  # and one call without ties
    np.testing.assert_array_equal(
        average_ranks(torch.from_numpy(x)).numpy(), scipy.stats.rankdata(x, axis=1)
    )
    expected = [scipy.stats.spearmanr(call, w).statistic for call in x]
    # sums of multiples of 1/4 are exact here; a root, a product, a quotient: scipy's own sums round a little more
    found = spearman(torch.from_numpy(x), torch.from_numpy(w))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=50 * 2**-53)


@pytest.mark.parity("P16")
def test_spearman_of_a_constant_is_zero():
    x = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    assert spearman(x, torch.tensor([1.0, 2.0, 5.0])).tolist() == [0.0, 1.0]
    assert spearman(x, torch.ones(3)).tolist() == [0.0, 0.0]


@pytest.mark.parity("P16")
def test_only_the_order_of_the_weights_counts():
    x, w = (torch.from_numpy(part) for part in with_ties(7))
    rho = spearman(x, w)
    assert torch.equal(spearman(x, w**3 + 5), rho)
    assert torch.equal(spearman(torch.exp(x), torch.exp(w)), rho)
    assert not torch.equal(spearman(x, -w), rho)


@pytest.mark.parity("P16")
def test_complementary_calls_weigh_more():
    x = torch.from_numpy(np.random.default_rng(3).lognormal(size=(30, 20)))
    w = torch.from_numpy(np.random.default_rng(4).lognormal(size=20))
    rho, eta = spearman(x, w), call_weights(x, w)
    assert bool((eta > 0).all())
    assert abs(eta.sum().item() - 1) < 30 * 2**-53
    assert eta.argsort().tolist() == rho.argsort(descending=True).tolist()
    by_numpy = np.exp(-rho.numpy()) / np.exp(-rho.numpy()).sum()
    np.testing.assert_allclose(eta.numpy(), by_numpy, rtol=1e-14)


@pytest.mark.parity("P16")
def test_calls_of_equal_rank_order_weigh_the_same():
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 11.0, 99.0], [0.0, 0.1, 0.2], [5.0, 6.0, 7.0]])
    assert call_weights(x, torch.tensor([3.0, 1.0, 2.0])).tolist() == [0.25] * 4


def test_aggregate_by_hand():
    """rho = 1 and -1, so eta = e^-1 and e^1 over their sum, e^2 = 7.389 apart."""
    site = as_site([[1.0, 2.0, 4.0], [8.0, 4.0, 2.0]], [[0.5, 1.0, -2.0]])
    first = 1 / (1 + math.exp(2))
    expected = [8 - 7 * first, 4 - 2 * first, 2 + 2 * first]
    np.testing.assert_allclose(aggregate(site, ssc=True).numpy(), expected, rtol=1e-15)


@pytest.mark.parity("P8")
def test_one_call_is_smoothquant_at_that_call():
    site = random_site(calls=1)
    found = PTQ4DIT.transform([site], Ptq4ditOptions())
    expected = SMOOTHQUANT.transform([site], SmoothQuantOptions(alpha=0.5))
    assert torch.equal(found.sites["qkv"].smooth, expected.sites["qkv"].smooth)
    assert found.sites["qkv"].shift is None


@pytest.mark.parity("P8")
@pytest.mark.parametrize(("calls", "middle"), [(1, 0), (2, 1), (7, 3), (50, 25)])
def test_without_ssc_it_is_smoothquant_at_the_middle_call(calls, middle):
    site = random_site(calls)
    one = SiteData("qkv", site.minimum[middle][None], site.maximum[middle][None], site.weight)
    found = PTQ4DIT.transform([site], Ptq4ditOptions(ssc=False))
    expected = SMOOTHQUANT.transform([one], SmoothQuantOptions(alpha=0.5))
    assert torch.equal(found.sites["qkv"].smooth, expected.sites["qkv"].smooth)
    assert found.group_of_call == (0,) * calls


def test_calibration_calls():
    assert calibration_calls(1) == [0]
    assert calibration_calls(25) == list(range(25))
    assert calibration_calls(50) == list(range(0, 50, 2))
    assert calibration_calls(250) == list(range(0, 250, 10))
    assert calibration_calls(26) == list(range(25))  # floor(26 j / 25) = j


def test_only_calibration_calls_count():
    site = random_site(calls=50)
    used = SiteData("qkv", site.minimum[::2], site.maximum[::2], site.weight)
    assert torch.equal(aggregate(site, ssc=True), aggregate(used, ssc=True))


@pytest.mark.parity("P15")
def test_balancing_makes_salience_equal():
    """CSB: B^X = 1 / s and B^W = s undo each other, and a / s = w s."""
    site = random_site(calls=9, width=300)
    smooth = PTQ4DIT.transform([site], Ptq4ditOptions()).sites["qkv"].smooth
    a = aggregate(site, ssc=True)
    torch.testing.assert_close(a / smooth, site.weight_absmax * smooth, rtol=1e-12, atol=0)
    balanced = (a * site.weight_absmax).sqrt()  # Eq. 5, then B^X = balanced / a, B^W = balanced / w
    torch.testing.assert_close(1 / smooth, balanced / a, rtol=1e-12, atol=0)
    torch.testing.assert_close(smooth, balanced / site.weight_absmax, rtol=1e-12, atol=0)


@pytest.mark.parity("P15")
@pytest.mark.parametrize("seed", range(20))
def test_of_a_single_call_the_overall_salience_does_not_grow(seed):
    site = random_site(calls=1, seed=seed)
    smooth = PTQ4DIT.transform([site], Ptq4ditOptions()).sites["qkv"].smooth
    x, w = site.absmax[0], site.weight_absmax
    after = max((x / smooth).max(), (w * smooth).max())
    assert after <= max(x.max(), w.max()) * (1 + 1e-14)  # a root, a quotient and a product round


def test_of_several_calls_it_can_grow():
    """One channel, salience 1, 1e-3, 1e-3, 1e-3: rho = 0, a = 0.25075, so the first call becomes
    1 / sqrt(0.25075) = 1.99701. Eq. 8 is a statement about a single call."""
    site = as_site([[1.0], [1e-3], [1e-3], [1e-3]], [[1.0]])
    smooth = PTQ4DIT.transform([site], Ptq4ditOptions()).sites["qkv"].smooth
    # 1e-3 is rounded to fp32: 3 * 2^-24 * 1e-3 / 0.25 / 2 relative
    np.testing.assert_allclose(1 / smooth.item(), 0.25075**-0.5, rtol=4e-10)
