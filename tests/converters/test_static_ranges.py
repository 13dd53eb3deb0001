"""`range_method` in a conversion: searched on the sampled rows as the layer sees them, judged by numpy."""

import numpy as np
import pytest
import torch

from ditq_converters import Recipe, StatisticsError, calibrate, convert
from ditq_converters.methods import SiteData, Transform

STEPS = 20  # two timestep groups by default
SITES = {  # site -> one of its consumers
    "qkv": "attn1.to_q",
    "o_proj": "attn1.to_out.0",
    "fc1": "ff.net.0.proj",
    "fc2": "ff.net.2",
}
BLOCK = "transformer_blocks.1"


@pytest.fixture(scope="module")
def model(make_dit):
    return make_dit(3)


@pytest.fixture(scope="module")
def stats(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranges") / "stats"
    return calibrate(
        model, out, steps=STEPS, samples=2, rows=8, seed=1, quiet=True
    )  # all searches clip


def numpy_search(method, x, low, high):
    """The candidate of least error, by numpy in fp64 and the int8 of `docs/format.md`."""
    if method == "qdiff_mse":
        pairs = [(low * (1 - m / 100), high * (1 - m / 100)) for m in range(80)]
    else:
        pairs = [(np.quantile(x, 1 - p), np.quantile(x, p)) for p in (0.999, 0.9999, 0.99999)]
    power = 2.4 if method == "qdiff_mse" else 2
    errors = []
    for pair in pairs:
        below, above = min(pair[0], 0), max(pair[1], 0)
        step = (above - below) / 255
        zero = np.rint(-below / step)
        error = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step - x
        errors.append((np.abs(error) ** power).mean())
    return pairs[int(np.argmin(errors))]


def stored_range(layer):
    """Ends of the range that scale and zero point stand for."""
    scale, zero = layer.site.act_scale.item(), layer.site.act_zero.item()
    return scale * (-128 - zero), scale * (127 - zero)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("method", ["qdiff_mse", "ptq4dit_pct"])
def test_the_range_is_searched_on_the_rows_of_all_calls(model, stats, method, site):
    recipe = Recipe("linear", "w8", "static", range_method=method)
    layer = convert(model, recipe, stats, quiet=True).get_submodule(f"{BLOCK}.{SITES[site]}")
    x = stats.rows(f"{BLOCK}.{site}")[0].double().numpy().ravel()
    low, high = (side.double().numpy() for side in stats.ranges(f"{BLOCK}.{site}"))
    expected = numpy_search(method, x, low.min(), high.max())
    step = layer.site.act_scale.item()
    # the zero point rounds: the ends may lie half a step off
    np.testing.assert_allclose(stored_range(layer), expected, rtol=0, atol=0.51 * step)
    width = max(expected[1], 0) - min(expected[0], 0)
    np.testing.assert_allclose(step, width / 255, rtol=1e-5)
    assert width < high.max() - low.min()  # it clips


def test_the_rows_are_those_after_shift_and_factor(model, stats):
    """HTG shifts and scales: what the search sees is what numpy computes from the folded tensors."""
    recipe = Recipe("htg", "w8", "static", modulation="w8", range_method="ptq4dit_pct")
    packed = convert(model, recipe, stats, quiet=True)
    block, source = packed.get_submodule(BLOCK), model.get_submodule(BLOCK)
    bias, own = block.norm1.linear.bias.double(), source.norm1.linear.bias.double()
    assert bias.shape[0] == 2
    u = bias[0, 256:320] / (own[256:320] + 1)  # fc1: the multiplier's constant, chunk 4
    shift = own[192:256] - bias[:, 192:256] / u  # chunk 3 holds u (b - z_g), by rising timestep
    rows = stats.rows(f"{BLOCK}.fc1")[0].double()
    bound = block.timestep_groups.bounds.item()
    group = torch.tensor([int(t > bound) for t in stats.timesteps])
    x = ((rows - shift[group][:, None]) * u).numpy().ravel()
    expected = numpy_search("ptq4dit_pct", x, x.min(), x.max())
    step = block.ff.net[0].proj.site.act_scale.item()
    np.testing.assert_allclose(
        stored_range(block.ff.net[0].proj), expected, rtol=0, atol=0.51 * step
    )


def test_meta_searches_its_one_call(model, stats):
    recipe = Recipe("meta", "w8", "static", range_method="ptq4dit_pct")
    layer = convert(model, recipe, stats, quiet=True).get_submodule(f"{BLOCK}.attn1.to_q")
    x = stats.rows(f"{BLOCK}.qkv")[0][0].double().numpy().ravel()
    expected = numpy_search("ptq4dit_pct", x, x.min(), x.max())
    np.testing.assert_allclose(
        stored_range(layer), expected, rtol=0, atol=0.51 * layer.site.act_scale.item()
    )


def test_statistics_without_rows_are_refused(model, tmp_path):
    bare = calibrate(model, tmp_path / "stats", steps=2, samples=1, rows=0, quiet=True)
    recipe = Recipe("linear", "w8", "static", range_method="qdiff_mse")
    with pytest.raises(StatisticsError, match=r"no sampled rows; calibrate .* --rows 64"):
        convert(model, recipe, bare, quiet=True)


def test_rows_of_a_call_that_has_none_are_refused():
    x = torch.zeros(1, 2, 3)
    weight = torch.ones(1, 3, dtype=torch.float64)
    site = SiteData("fc1", x[0], x[0], weight, rows=x, row_calls=(1,))
    assert site.rows_after(Transform(), ()).shape == (2, 3)
    with pytest.raises(ValueError, match="'fc1' has no sampled rows"):
        site.rows_after(Transform(), (), only=0)
