"""DiTAS: its grid search against losses recomputed in numpy with quantizers of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_converters.methods import Quantizers, SiteData
from ditq_converters.methods.ditas import ALPHAS, DITAS, DitasOptions, best_alpha, grid_losses
from ditq_converters.methods.smoothquant import SMOOTHQUANT, SmoothQuantOptions

SETTINGS = [
    Quantizers(weights="w8", activations="token"),
    Quantizers(weights="w8", activations="static"),
    Quantizers(weights="w4p", activations="token", group_size=64),  # K = 96: groups of 32
    Quantizers(weights="w4g", activations="static", group_size=64),
    Quantizers(weights="w4g", activations="token", group_size=64, symmetric=True),
]
IDS = ["w8-token", "w8-static", "w4p-token", "w4g-static", "w4g-symmetric-token"]


def as_site(seed=0, quantizers=Quantizers(), calls=6, sampled=3, rows=5, width=96, outputs=40):  # noqa: B008  frozen
    """Channels of very different size; statistics cover more than the sampled rows."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(0, 1.5, width)
    x = (rng.normal(size=(calls, 4 * rows, width)) * size + size).astype(np.float32)
    weight = rng.normal(size=(outputs, width)) * rng.lognormal(-3, 0.5, width)
    x = torch.from_numpy(x)
    taken = tuple(range(0, 2 * sampled, 2))
    return SiteData(
        "fc2", x.amin(1), x.amax(1), torch.from_numpy(weight), "none", x[taken, :rows], taken,
        quantizers,
    )  # fmt: skip


def int8_rows(values):
    """Symmetric int8 with a scale for every row, in fp32."""
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    return np.clip(np.rint(values * (np.float32(1) / scale)), -127, 127), scale


def static_int8(values, low, high):
    scale = (np.float32(high) - np.float32(low)) / np.float32(255)
    inverse = np.float32(1) / scale
    zero = np.clip(np.rint(np.float32(-low) * inverse), 0, 255)
    return np.clip(np.rint(values * inverse) + zero, 0, 255) - zero, scale


def int4_groups(values, size, symmetric):
    """4 bits with a scale for every group of a row, with a zero point unless symmetric; the real values in fp64."""
    groups = values.reshape(len(values), -1, size)
    if symmetric:
        scale, zero, least = np.abs(groups).max(2, keepdims=True) / np.float32(7), 0, -7
    else:
        low, high = (
            np.minimum(groups.min(2, keepdims=True), 0),
            np.maximum(groups.max(2, keepdims=True), 0),
        )
        scale = (high - low) / np.float32(15)
        zero, least = np.clip(np.rint(-low * (np.float32(1) / scale)), 0, 15), 0
    codes = np.clip(np.rint(groups * (np.float32(1) / scale)) + zero, least, 7 if symmetric else 15)
    return ((codes - zero).astype(float) * scale).reshape(values.shape)


def recomputed(site, alpha):
    """The loss in fp64, and how far an fp32 evaluation of its root may be off."""
    options = site.quantizers
    low, high = site.minimum.numpy().astype(float), site.maximum.numpy().astype(float)
    weight, rows = site.weight.numpy(), site.rows.numpy().reshape(-1, site.weight.shape[1])
    a = np.maximum(np.abs(low), np.abs(high)).max(axis=0)
    smooth = a**alpha / np.abs(weight).max(axis=0) ** (1 - alpha)
    smoothed = rows * (1 / smooth).astype(np.float32)
    if options.activations == "token":
        q, scale = int8_rows(smoothed)
    else:
        q, scale = static_int8(smoothed, (low / smooth).min(), (high / smooth).max())
    x = q.astype(float) * scale
    if options.weights == "w8":
        q, scale = int8_rows((weight * smooth).astype(np.float32))
        w = q.astype(float) * scale
    elif options.weights == "w4g":
        w = int4_groups((weight * smooth).astype(np.float32), 32, options.symmetric)
    else:  # has tests of its own
        w = k.quantize_weight_w4p(torch.from_numpy(weight * smooth), 32).dequantize().numpy()
        w = w.astype(float)
    error = x @ w.T - rows.astype(float) @ weight.T
    # per product of K terms, K + 3 roundings: operands, multiply, K - 1 additions, the subtraction
    terms = np.abs(x) @ np.abs(w).T + np.abs(rows) @ np.abs(weight).T
    return (error**2).sum(), np.linalg.norm(terms) * (weight.shape[1] + 3) * 2**-24


@pytest.mark.parity("P9")
@pytest.mark.parametrize("quantizers", SETTINGS, ids=IDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_selected_loss_is_the_least_of_21_recomputed_ones(quantizers, seed):
    site = as_site(seed, quantizers)
    losses = grid_losses(site)
    expected, bounds = zip(*(recomputed(site, alpha) for alpha in ALPHAS), strict=True)
    roots = np.sqrt(losses)
    assert (np.abs(roots - np.sqrt(expected)) <= bounds).all()
    # the bound must be able to tell losses apart
    assert np.ptp(roots) > 10 * max(bounds)
    chosen = ALPHAS.index(best_alpha(site))
    assert losses[chosen] == min(losses)
    assert np.sqrt(expected[chosen]) <= np.sqrt(min(expected)) + 2 * max(bounds)
    assert losses[chosen] <= losses[10]  # alpha = 1/2


@pytest.mark.parity("P9")
@pytest.mark.parametrize("quantizers", SETTINGS, ids=IDS)
def test_the_order_of_rows_does_not_matter(quantizers):
    site = as_site(5, quantizers)
    order = torch.from_numpy(np.random.default_rng(0).permutation(15))
    rows = site.rows.reshape(15, 1, 96)[order]
    shuffled = replace(site, rows=rows)
    assert best_alpha(shuffled) == best_alpha(site)
    # the same products, added in fp64 in another order; a BLAS may round a row by where it stands
    np.testing.assert_allclose(grid_losses(shuffled), grid_losses(site), rtol=1e-4)


def test_the_grid():
    assert [f"{alpha:.2f}" for alpha in ALPHAS[:3]] == ["0.00", "0.05", "0.10"]
    exact = [float(f"0.{5 * m:02}") for m in range(20)]
    assert list(ALPHAS) == [*exact, 1.0]


@pytest.mark.parity("P9")
def test_of_equal_losses_the_smaller_alpha_wins():
    site = as_site()
    silent = SiteData("qkv", site.minimum, site.maximum, site.weight, rows=0 * site.rows)
    assert grid_losses(silent) == [0.0] * 21
    assert best_alpha(silent) == 0.0


def test_the_static_range_comes_from_all_calls():
    site = as_site(quantizers=Quantizers(activations="static"))
    maximum = site.maximum.clone()
    widest = (maximum[5] * site.weight_absmax).argmax()
    maximum[5, widest] *= 50  # a call that no rows were sampled at
    wider = replace(site, maximum=maximum)
    wide = grid_losses(wider)
    # at alpha = 0 the factor is the same, so only the range can raise the loss
    assert wide[0] > 10 * grid_losses(site)[0]


@pytest.mark.parity("P8")
@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_without_search_it_is_smoothquant(alpha):
    sites, options = [as_site(seed) for seed in range(2)], DitasOptions(search=False, alpha=alpha)
    found, expected = (
        DITAS.transform(sites, options),
        SMOOTHQUANT.transform(sites, SmoothQuantOptions(alpha)),
    )
    assert found.group_of_call == expected.group_of_call
    for name, site in expected.sites.items():
        assert torch.equal(found.sites[name].smooth, site.smooth)
        assert found.sites[name].shift is None


def test_every_site_has_its_own_alpha():
    first, second = as_site(0), as_site(1)
    second = SiteData("qkv", second.minimum, second.maximum, second.weight, rows=second.rows)
    block = DITAS.transform([first, second], DitasOptions())
    assert list(block.sites) == ["fc2", "qkv"]
    for site in (first, second):
        options = SmoothQuantOptions(best_alpha(site))
        expected = SMOOTHQUANT.transform([site], options).sites[site.name].smooth
        assert torch.equal(block.sites[site.name].smooth, expected)


def test_a_search_without_rows_is_refused():
    site = as_site()
    bare = SiteData("qkv", site.minimum, site.maximum, site.weight)
    with pytest.raises(ValueError, match="site 'qkv' has no sampled rows"):
        DITAS.transform([bare], DitasOptions())
    assert DITAS.transform([bare], DitasOptions(search=False)).sites["qkv"].smooth is not None
    assert DITAS.reads_rows(DitasOptions())
    assert not DITAS.reads_rows(DitasOptions(search=False))


@pytest.mark.parametrize("field", ["weights", "activations"])
def test_an_unknown_quantizer_is_refused(field):
    with pytest.raises(ValueError, match=f"ditas: {field} must be"):
        grid_losses(as_site(quantizers=Quantizers(**{field: "w2"})))
