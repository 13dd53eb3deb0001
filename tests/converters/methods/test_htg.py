"""HTG against direct maxima, closed forms and hand-worked numbers."""

import numpy as np
import pytest
import torch

from ditq_converters.methods import SiteData, smoothquant
from ditq_converters.methods.htg import (
    HTG,
    HtgOptions,
    group_means,
    moving_average,
    shifted_absmax,
)
from ditq_converters.methods.timestep_groups import exact_dp, greedy


def inputs(calls=20, tokens=9, width=6, seed=0):
    """X [T, M, K] fp32 whose channels have offsets that drift, larger than their ranges."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(calls, 1, width, generator=generator).cumsum(dim=0) * 3 - 8
    return torch.randn(calls, tokens, width, generator=generator) + offset


def as_site(x, name="qkv", outputs=5, **flags):
    generator = torch.Generator().manual_seed(len(name) + outputs)
    weight = torch.randn(outputs, x.shape[2], generator=generator, dtype=torch.float64)
    return SiteData(name, x.amin(dim=1), x.amax(dim=1), weight, **flags)


def centres(x):
    return ((x.amin(dim=1).double() + x.amax(dim=1).double()) / 2).numpy()


def test_by_hand():
    """One channel, calls [-1, 3], [1, 7], [10, 12]: centres 1, 4, 11; Ward joins the first two (4.5 < 24.5).
    Shifts 2.5 and 11; A = 2 + 1.5, 3 + 1.5, 1 + 0; with c = 3/4, m = 3.75, then 3.0625; w = 1/4, s = 3.5."""
    x = torch.tensor([[[-1.0], [3.0]], [[1.0], [7.0]], [[10.0], [12.0]]])
    low, high = x.amin(dim=1), x.amax(dim=1)
    weight = torch.tensor([[0.125], [-0.25]], dtype=torch.float64)
    block = HTG.transform([SiteData("fc1", low, high, weight)], HtgOptions(num_groups=2, ema=0.75))
    assert block.group_of_call == (0, 0, 1)
    assert block.sites["fc1"].shift.tolist() == [[2.5], [11.0]]
    assert block.sites["fc1"].smooth.tolist() == [3.5]


@pytest.mark.parity("P8")
def test_without_shift_and_average_one_call_is_smoothquant():
    site = as_site(inputs(calls=1))
    found = HTG.transform([site], HtgOptions(shift=False, ema=0.0))
    expected = smoothquant.SMOOTHQUANT.transform([site], smoothquant.SmoothQuantOptions(alpha=0.5))
    assert found.group_of_call == expected.group_of_call == (0,)
    assert found.sites["qkv"].shift is None
    assert torch.equal(found.sites["qkv"].smooth, expected.sites["qkv"].smooth)


@pytest.mark.parity("P18")
def test_a_group_for_every_call_shifts_every_call_by_its_centre():
    x = inputs(calls=7)
    site = as_site(x)
    block = HTG.transform([site], HtgOptions(num_groups=99))  # no more groups than calls
    assert block.group_of_call == tuple(range(7))
    shift = block.sites["qkv"].shift
    np.testing.assert_array_equal(shift.numpy(), centres(x))
    half_range = (site.maximum.double() - site.minimum.double()) / 2
    # differences of numbers below 64 in fp64: 2^-48 = 4e-15 at most
    torch.testing.assert_close(shifted_absmax(site, shift), half_range, rtol=0, atol=4e-15)


@pytest.mark.parity("P18")
def test_the_range_after_a_shared_shift_is_that_of_the_shifted_input():
    x = inputs()
    site, groups = as_site(x), [0] * 8 + [1] * 12
    z = torch.from_numpy(centres(x))
    shift = group_means(z, groups)[groups]
    direct = (x.double() - shift[:, None]).abs().amax(dim=1)
    assert torch.equal(shifted_absmax(site, shift), direct)
    formula = (site.maximum.double() - site.minimum.double()) / 2 + (z - shift).abs()
    # three roundings of numbers below 64 against one
    torch.testing.assert_close(direct, formula, rtol=0, atol=2e-14)


def test_group_means_are_means():
    z = inputs(calls=5)[:, 0].double()
    means = group_means(z, (0, 0, 0, 1, 1))
    np.testing.assert_allclose(means[0], (z[0] + z[1] + z[2]).numpy() / 3, rtol=1e-14)
    np.testing.assert_allclose(means[1], (z[3] + z[4]).numpy() / 2, rtol=1e-14)


@pytest.mark.parity("P18")
@pytest.mark.parametrize("coefficient", [0.0, 0.5, 0.99, 1.0])
def test_the_moving_average_equals_its_closed_form(coefficient):
    """m = c^(T-1) A_0 + sum over i >= 1 of (1 - c) c^(T-1-i) A_i: positive terms, so relative rounding adds up."""
    a = np.random.default_rng(0).lognormal(size=(100, 5))
    weights = (1 - coefficient) * coefficient ** np.arange(99.0, -1, -1)
    weights[0] = coefficient**99
    found = moving_average(torch.from_numpy(a), coefficient)
    np.testing.assert_allclose(found.numpy(), weights @ a, rtol=4 * 100 * 2**-53)


@pytest.mark.parity("P18")
def test_no_root_of_a_negative_number():
    """After a group's shift a channel may lie wholly below zero: its signed maximum would be negative."""
    x = torch.tensor([[[-9.0], [-8.0]], [[5.0], [6.0]]])
    site = SiteData("qkv", x.amin(dim=1), x.amax(dim=1), -torch.ones(2, 1, dtype=torch.float64))
    smooth = HTG.transform([site], HtgOptions()).sites["qkv"].smooth  # shift -1.5, A = 7.5 twice
    torch.testing.assert_close(smooth, torch.tensor([7.5], dtype=torch.float64).sqrt())


def test_the_average_runs_from_the_noisiest_call():
    x = torch.zeros(3, 2, 1)
    x[0] = torch.tensor([[-100.0], [100.0]])
    site = SiteData("qkv", x.amin(dim=1), x.amax(dim=1), torch.ones(1, 1, dtype=torch.float64))
    smooth = HTG.transform([site], HtgOptions()).sites["qkv"].smooth
    np.testing.assert_allclose(smooth.item() ** 2, 100 * 0.99**2, rtol=1e-14)


def block_of_sites(calls=20):
    return [
        as_site(inputs(calls, seed=1), "qkv"),
        as_site(inputs(calls, seed=2) * 5, "o_proj", shifts="constant"),
        as_site(inputs(calls, seed=3, width=11), "fc1"),
        as_site(inputs(calls, seed=4) * 5, "fc2", shifts="none"),
    ]


@pytest.mark.parametrize("linkage", ["ward", "centroid", "average", "exact_dp"])
def test_a_block_is_clustered_once_on_its_grouped_sites(linkage):
    sites = block_of_sites()
    z = torch.cat([(sites[i].maximum.double() + sites[i].minimum.double()) / 2 for i in (0, 2)], 1)
    block = HTG.transform(sites, HtgOptions(num_groups=4, linkage=linkage))
    expected = exact_dp(z, 4) if linkage == "exact_dp" else greedy(z, 4, linkage)
    assert block.group_of_call == expected
    assert block.num_groups == 4
    assert block.sites["qkv"].shift.shape == (4, 6)
    assert block.sites["fc1"].shift.shape == (4, 11)


def test_layers_with_groups_of_their_own_are_those_alone():
    """A block switches where any layer does; at every call a layer has the shift that it has in a block of its own."""
    sites = block_of_sites()
    options = HtgOptions(num_groups=3, groups_per_layer=True)
    block = HTG.transform(sites, options)
    alone = {name: HTG.transform([sites[i]], HtgOptions(num_groups=3)) for i, name in SHIFTED}
    edges = {name: set(np.flatnonzero(np.diff(one.group_of_call))) for name, one in alone.items()}
    assert edges["qkv"] != edges["fc1"]
    assert set(np.flatnonzero(np.diff(block.group_of_call))) == edges["qkv"] | edges["fc1"]
    for name, one in alone.items():
        expected = one.sites[name].shift[list(one.group_of_call)]
        assert torch.equal(block.sites[name].shift[list(block.group_of_call)], expected)
        assert torch.equal(block.sites[name].smooth, one.sites[name].smooth)
    shared = HTG.transform(sites, HtgOptions(num_groups=3))
    for name in ("o_proj", "fc2"):
        assert torch.equal(block.sites[name].smooth, shared.sites[name].smooth)
    assert block.sites["o_proj"].shift.shape == (1, 6)


SHIFTED = ((0, "qkv"), (2, "fc1"))  # of block_of_sites


def test_one_shift_for_all_groups_where_the_producer_has_no_groups():
    sites = block_of_sites()
    found = HTG.transform(sites, HtgOptions(num_groups=4)).sites["o_proj"]
    mean = ((sites[1].maximum.double() + sites[1].minimum.double()) / 2).mean(dim=0)
    # a sum of 20 numbers below 512
    torch.testing.assert_close(found.shift, mean[None], rtol=0, atol=1e-12)
    x = inputs(20, seed=2) * 5
    m = moving_average((x.double() - found.shift).abs().amax(dim=1), 0.99)
    expected = (m / sites[1].weight.abs().amax(dim=0)).sqrt()
    torch.testing.assert_close(found.smooth, expected, rtol=1e-13, atol=0)


def test_what_cannot_be_shifted_is_only_scaled():
    found = HTG.transform(block_of_sites(), HtgOptions()).sites["fc2"]
    data = block_of_sites()[3]
    assert found.shift is None
    m = moving_average(data.absmax, 0.99)
    assert torch.equal(found.smooth, smoothquant.smooth_factor(m, data.weight_absmax, 0.5))


@pytest.mark.parametrize(("calls", "groups"), [(1, 1), (9, 1), (10, 1), (19, 1), (20, 2), (59, 5)])
def test_a_group_for_every_ten_calls(calls, groups):
    assert HTG.transform([as_site(inputs(calls))], HtgOptions()).num_groups == groups


def test_the_halves_can_be_switched_off():
    sites = block_of_sites()
    both = HTG.transform(sites, HtgOptions())
    shift_only = HTG.transform(sites, HtgOptions(scale=False))
    assert shift_only.group_of_call == both.group_of_call
    assert shift_only.sites.pop("fc2").shift is None
    for name, site in shift_only.sites.items():
        assert site.smooth is None
        assert torch.equal(site.shift, both.sites[name].shift)
    scale_only = HTG.transform(sites, HtgOptions(shift=False))
    assert scale_only.num_groups == 1
    for site, data in zip(scale_only.sites.values(), sites, strict=False):
        assert site.shift is None
        m = moving_average(data.absmax, 0.99)
        assert torch.equal(site.smooth, smoothquant.smooth_factor(m, data.weight_absmax, 0.5))
    neither = HTG.transform(sites, HtgOptions(shift=False, scale=False))
    assert neither.sites == {}
    assert neither.group_of_call == (0,) * 20


def test_without_a_grouped_site_there_is_one_group():
    block = HTG.transform(block_of_sites()[1:2], HtgOptions(num_groups=4))
    assert block.num_groups == 1
    assert block.sites["o_proj"].shift.shape == (1, 6)


@pytest.mark.parametrize("options", [{"num_groups": 0}, {"ema": 1.5}, {"linkage": "single"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"option {next(iter(options))} must"):
        HtgOptions(**options)
