"""Activation ranges against direct minima and maxima, numpy and hand-worked numbers."""

import numpy as np
import pytest
import torch

from ditq_converters.methods import METHODS, SiteData, Transform
from ditq_converters.methods.htg import HTG, HtgOptions
from ditq_converters.methods.ranges import after, minmax, ptq4dit_pct, qdiff_mse


def inputs(calls=12, tokens=30, width=8, seed=0):
    """X [T, M, K] fp32 with offsets."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(calls, 1, width, generator=generator).cumsum(dim=0) * 4
    return torch.randn(calls, tokens, width, generator=generator) + offset


def through_int8(x, low, high):
    """numpy fp32, zero inside."""
    low, high = min(np.float32(low), np.float32(0)), max(np.float32(high), np.float32(0))
    scale = (high - low) / np.float32(255)
    inverse = np.float32(1) / scale
    zero = np.clip(np.rint(-low * inverse), 0, 255)
    return (np.clip(np.rint(x * inverse) + zero, 0, 255) - zero).astype(np.float32) * scale


def scalars(low, high):
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)


@pytest.mark.parity("P14")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("halves", [(True, True), (True, False), (False, True), (False, False)])
def test_ranges_from_channel_statistics_equal_direct_ones(shared, halves):
    x, groups = inputs(), (0,) * 5 + (1,) * 7
    generator = torch.Generator().manual_seed(1)
    shift = torch.randn(1 if shared else 2, 8, generator=generator, dtype=torch.float64)
    smooth = torch.rand(8, generator=generator, dtype=torch.float64) + 0.1
    transform = Transform(smooth if halves[0] else None, shift if halves[1] else None)
    direct = x.double()
    if halves[1]:
        direct = torch.stack([direct[i] - shift[0 if shared else groups[i]] for i in range(12)])
    if halves[0]:
        direct = direct / smooth
    low, high = after(x.amin(1), x.amax(1), transform, groups)
    assert torch.equal(low, direct.amin(1))
    assert torch.equal(high, direct.amax(1))
    for found, expected in zip(minmax(low, high), (direct.min(), direct.max()), strict=True):
        assert found.dtype == torch.float32
        assert found == expected.float()


def test_htg_centres_what_it_shifts():
    x = inputs(tokens=50) + 100
    weight = torch.ones(3, 8, dtype=torch.float64)
    site = SiteData("qkv", x.amin(1), x.amax(1), weight)
    block = HTG.transform([site], HtgOptions(num_groups=12, scale=False))
    low, high = after(site.minimum, site.maximum, block.sites["qkv"], block.group_of_call)
    # opposite ends of numbers below 256
    torch.testing.assert_close(low, -high, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_qdiff_takes_the_best_of_80_factors(seed):
    x = np.random.default_rng(seed).standard_t(4, 4000).astype(np.float32)
    low, high = scalars(2 * x.min(), 1.5 * x.max())  # statistics see more rows than the sample
    scores = []
    for m in range(80):
        shrink = 1 - m / 100
        error = (
            through_int8(x, low.numpy() * np.float32(shrink), high.numpy() * np.float32(shrink)) - x
        )
        scores.append((np.abs(error.astype(float)) ** 2.4).mean())
    best = int(np.argmin(scores))
    assert 0 < best < 79  # it pays to shrink, but not to the end
    # scores near the minimum differ by far more than the fp32 powers, each within a few 2^-24
    assert np.sort(scores)[1] / min(scores) > 1 + 1e-5
    found = qdiff_mse(torch.from_numpy(x), low, high)
    for end, whole in zip(found, (low, high), strict=True):
        np.testing.assert_allclose(end.item(), whole.item() * (1 - best / 100), rtol=1e-6)


def test_qdiff_keeps_an_exact_range_and_the_first_of_equals():
    low, high = scalars(0.0, 255.0)
    whole = torch.arange(256.0)
    assert qdiff_mse(whole, low, high) == (low, high)
    assert qdiff_mse(torch.zeros(9), low, high) == (low, high)  # every factor has error 0


@pytest.mark.parametrize(("seed", "clip"), [(0, 3000.0), (1, 60.0), (2, 1.0)])
def test_pct_takes_the_best_pair_of_quantiles(seed, clip):
    x = np.random.default_rng(seed).normal(size=20000).astype(np.float32)
    x[:12] *= clip  # outliers of several sizes
    pairs = [
        (np.quantile(x.astype(float), 1 - p), np.quantile(x.astype(float), p))
        for p in (0.999, 0.9999, 0.99999)
    ]
    scores = [((through_int8(x, *pair) - x).astype(float) ** 2).mean() for pair in pairs]
    found = ptq4dit_pct(torch.from_numpy(x))
    np.testing.assert_allclose(
        [end.item() for end in found], pairs[int(np.argmin(scores))], rtol=1e-6
    )


def test_pct_by_hand():
    """A 255 after 1000 zeros: quantile p sits at 1000 p, so the highs are 0, 229.5 and 252.45; the last clips least."""
    x = torch.zeros(1001)
    x[17] = 255
    low, high = ptq4dit_pct(x)
    assert low == 0
    np.testing.assert_allclose(high.item(), 252.45, rtol=1e-6)


def test_of_equal_pairs_the_first_wins():
    low, high = ptq4dit_pct(torch.full((50,), 3.0))
    assert (low.item(), high.item()) == (3.0, 3.0)


def test_meta_has_no_transform_and_calibrates_on_the_noisiest_call():
    meta = METHODS["meta"]
    assert meta.transform is None
    assert meta.needs_statistics
    assert meta.static_call == 0


def test_qdiff_may_shrink_to_a_fifth():
    """Multiples of 0.21 up to 53.55 have codes of their own at factor 0.21, the last of the 80, and at no other."""
    low, high = scalars(0.0, 255.0)
    found = qdiff_mse(torch.arange(256.0) * 0.21, low, high)
    np.testing.assert_allclose([end.item() for end in found], [0, 53.55], rtol=1e-6)
