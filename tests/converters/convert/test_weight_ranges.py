"""Weight ranges that clip, against numpy, candidate by candidate."""

import numpy as np
import pytest
import torch

from ditq_converters.convert.weight_ranges import quantize_clipped
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.stored_weight import quantize_weight

W8 = LayerFormat("w8", "token")
W4P = LayerFormat("w4p", "token", 32)
W4G = LayerFormat("w4g", "token", 32)
FORMATS = pytest.mark.parametrize("layer_format", [W8, W4P, W4G], ids=["w8", "w4p", "w4g"])
SEARCHES = pytest.mark.parametrize("ranges", ["mse", "ptq4dit_pct"])


def weights(rows=6, columns=96):
    """Rows with heavy tails, one with a single outlier, one without any."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator).reciprocal()
    weight[0] = torch.linspace(-1, 1, columns)
    weight[0, 5] = 300
    weight[1] = torch.sign(torch.linspace(-1, 1, columns))
    return weight


def clipped(units, ranges):
    """Candidates [C, U, K] of units [U, K], fp64."""
    low, high = units.min(1, keepdims=True), units.max(1, keepdims=True)
    if ranges == "mse":
        return [units.clip(low * s, high * s) for s in np.arange(1, 0.49, -0.05)]
    pairs = [np.quantile(units, [1 - p, p], axis=1) for p in (0.999, 0.9999, 0.99999)]
    return [units.clip(low[:, None], high[:, None]) for low, high in pairs]


@FORMATS
def test_minmax_is_what_the_format_does_by_itself(layer_format):
    found = quantize_clipped(weights(), layer_format, False, "minmax")
    assert torch.equal(found.dequantize(), quantize_weight(weights(), layer_format).dequantize())


@SEARCHES
def test_int8_rows_take_the_clip_of_least_squared_error(ranges):
    """With absmax a of a clip the step is a / 127; the error of a row is that of its nearest codes within +-127."""
    units = weights().double().numpy()
    steps = np.stack([np.abs(c).max(1) / 127 for c in clipped(units, ranges)])  # [C, U]
    codes = (units / steps[..., None]).round().clip(-127, 127)
    errors = np.square(codes * steps[..., None] - units).sum(2)
    found = quantize_clipped(weights(), W8, False, ranges)
    taken = np.abs(steps / found.scale.numpy() - 1).argmin(0)
    # steps and errors in fp32: the candidate that is taken may lose to another by their rounding, 1e-5 of it
    assert (errors[taken, range(6)] <= errors.min(0) * (1 + 1e-5)).all()
    np.testing.assert_allclose(found.scale, steps[taken, range(6)], rtol=1e-6)
    if ranges == "mse":
        assert taken[1] == 0  # two values alone: nothing to clip, the first of equals


@FORMATS
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_search_never_ends_above_minmax(layer_format, symmetric):
    """Of `mse`: its first candidate is min-max itself, in every unit."""
    weight, size = weights(), 32 if layer_format is W4G else 96

    def errors(ranges):
        found = quantize_clipped(weight, layer_format, symmetric, ranges).dequantize()
        return (found.double() - weight.double()).square().reshape(-1, size).sum(1)

    plain, searched = errors("minmax"), errors("mse")
    assert bool((searched <= plain).all())
    if layer_format is W4G:  # the steps of int8 are too fine to give an outlier up
        assert float(searched.sum()) < float(plain.sum())


@SEARCHES
def test_groups_are_searched_by_themselves(ranges):
    """The groups of a `w4g` row are what its pieces would be as rows."""
    weight = weights()
    whole = quantize_clipped(weight, W4G, False, ranges)
    for j in range(3):
        part = quantize_clipped(weight[:, 32 * j : 32 * (j + 1)].contiguous(), W4G, False, ranges)
        assert torch.equal(whole.scale[:, j], part.scale[:, 0])
        assert torch.equal(whole.weight_zero[:, j], part.weight_zero[:, 0])
        assert torch.equal(whole.packed[:, 16 * j : 16 * (j + 1)], part.packed)


def test_an_outlier_is_given_up_where_the_others_gain_more():
    """63 values of +-1/2 and one of 2 in a group, symmetric int4: steps of 2/7 round 1/2 to 4/7, an error of 1/14
    each and none for the 2: 0.3214. With 0.9 of the range, steps of 1.8/7, 1/2 becomes 3.6/7, off by 0.1/7 each, and
    the 2 loses 0.2: 0.0529. With 0.95 the 2 loses 0.1, 1/2 is off by 0.3/7: 0.1257; with 0.85: 0.1029."""
    weight = torch.full((1, 64), 0.5)
    weight[0, ::2] *= -1
    weight[0, 0] = 2
    layer_format = LayerFormat("w4g", "token", 64)
    found = quantize_clipped(weight, layer_format, True, "mse")
    np.testing.assert_allclose(found.scale.item(), 0.9 * 2 / 7, rtol=1e-6)
    error = (found.dequantize() - weight).square().sum().item()
    np.testing.assert_allclose(error, 63 * (0.1 / 7) ** 2 + 0.2**2, rtol=1e-4)
