"""Weight quantization: error, exactness of row folds, ranges, refusals."""

import math
import time

import pytest
import torch

import ditq_kernels as k


def sqnr(weight, approximation):
    weight, approximation = weight.double(), approximation.double()
    return 10 * math.log10(weight.square().sum() / (weight - approximation).square().sum())


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(1152, 4608, generator=torch.Generator().manual_seed(0)) * 0.02


def test_w8_error_is_at_most_half_a_step(gaussian):
    packed = k.quantize_weight_w8(gaussian)
    error = (packed.dequantize().double() - gaussian.double()).abs()
    assert (error <= 0.50001 * packed.scale[:, None].double()).all()
    assert packed.qweight.abs().amax(dim=1).eq(127).all()
    assert 40.5 < sqnr(gaussian, packed.dequantize()) < 42  # uniform noise at absmax 4 sigma: ~41.2


# a study of progressive quantization in another program: 21.4 dB at 64, 20.6 dB at 128 on Gaussians
@pytest.mark.parametrize(("group_size", "decibels"), [(64, 21.4), (128, 20.6)])
def test_w4p_reaches_the_expected_accuracy(gaussian, group_size, decibels):
    packed = k.quantize_weight_w4p(gaussian, group_size)
    assert abs(sqnr(gaussian, packed.dequantize()) - decibels) < 0.15


def test_w4p_of_a_big_layer_takes_seconds(gaussian):
    start = time.process_time()
    k.quantize_weight_w4p(gaussian, 64)
    assert time.process_time() - start < 15  # about 0.5 s of one core when nothing else runs


@pytest.mark.parametrize("group_size", [32, 96, 288])
def test_w4p_parts_agree(group_size, generator):
    weight = torch.randn(70, 288, generator=generator)
    weight[3] = 0
    weight[4, 5] = 100  # one outlier makes every other group tiny
    weight[5] = torch.where(torch.rand(288, generator=generator) < 0.5, -1.0, 1.0)  # both ends
    packed = k.quantize_weight_w4p(weight, group_size)
    num_groups = 288 // group_size
    assert packed.packed.shape == (70, 144)
    assert packed.group_scale.shape == packed.group_offset.shape == (70, num_groups)
    assert int(packed.group_scale.min()) >= 1
    assert int(packed.group_scale.max()) <= 17
    codes = k.unpack_int4(packed.packed).view(70, num_groups, group_size).int()
    values = codes * packed.group_scale[:, :, None].int() + packed.group_offset[:, :, None].int()
    assert values.abs().max() <= 127
    assert torch.equal(packed.expand().int(), values.view(70, 288))
    assert torch.equal(packed.dequantize(), packed.expand().float() * packed.scale[:, None])
    assert torch.equal(packed.weight_sum(), values.view(70, 288).sum(dim=1).int())
    assert (packed.dequantize()[3] == 0).all()
    # each range end lies within half a group step of its weight, here 17 / 2 steps of absmax / 127
    assert ((packed.dequantize()[5] - weight[5]).abs() <= 8.5 / 127 + 1e-6).all()


def test_w4p_error_is_bounded_by_the_unsearched_grid(generator):
    """The search keeps the least error of its candidates; the first is plain min-max rounding."""
    weight = torch.randn(40, 128, generator=generator)
    packed = k.quantize_weight_w4p(weight, 64)
    units = (weight * (1 / k.symmetric_scale(weight.abs().amax(dim=1)))[:, None]).view(40, 2, 64)
    high, low = units.amax(dim=2), units.amin(dim=2)
    scale = ((high - low) / 15).round().clamp(1, 17)[:, :, None]
    offset = ((high + low) / 2 - 7.5 * scale[:, :, 0]).round()[:, :, None]
    codes = ((units - offset) / scale).round().clamp(0, 15)
    values = codes * scale + offset
    legal = values.abs().amax(dim=2) <= 127  # our codes never leave the int8 range
    plain = (values - units).square().sum(dim=2)
    searched = (packed.expand().view(40, 2, 64).float() - units).square().sum(dim=2)
    assert legal.sum() > 40
    assert (searched <= plain * 1.0001)[legal].all()
    assert searched.sum() < plain.sum() * 0.97


@pytest.mark.parametrize("quantize", [k.quantize_weight_w8, lambda w: k.quantize_weight_w4p(w, 32)])
def test_rows_times_powers_of_two_commute_exactly(quantize, generator):
    weight = torch.randn(64, 96, generator=generator)
    factor = 2.0 ** torch.randint(-12, 12, (64,), generator=generator)
    plain, folded = quantize(weight), quantize(weight * factor[:, None])
    assert torch.equal(plain.expand(), folded.expand())
    assert torch.equal(plain.scale * factor, folded.scale)


def test_chunks_do_not_show(generator, monkeypatch):
    from ditq_kernels.codes import weights

    weight = torch.randn(50, 64, generator=generator)
    whole = k.quantize_weight_w4p(weight, 32)
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", 64 * 7)
    chunked = k.quantize_weight_w4p(weight, 32)
    assert torch.equal(whole.packed, chunked.packed)
    assert torch.equal(whole.group_scale, chunked.group_scale)
    assert torch.equal(whole.group_offset, chunked.group_offset)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("quantize", [k.quantize_weight_w8, lambda w: k.quantize_weight_w4p(w, 32)])
def test_non_finite_weights_are_refused(quantize, bad):
    weight = torch.ones(2, 32)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match=r"quantize_weight_w\w+: expected finite weights"):
        quantize(weight)


@pytest.mark.parity("P6")
def test_shapes_and_groups_are_refused_by_sentence():
    with pytest.raises(ValueError, match=r"quantize_weight_w8: expected a float weight \[N, K\]"):
        k.quantize_weight_w8(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"got K=96, group_size=64; take resolve_group_size"):
        k.quantize_weight_w4p(torch.ones(2, 96), 64)


@pytest.mark.parity("P6")
@pytest.mark.parametrize(
    ("in_features", "requested", "expected"),
    [
        (1152, 128, 128),
        (1152, 64, 64),
        (96, 64, 32),
        (96, 128, 96),
        (4608, 100, 96),
        (32, 500, 32),
        (96, 10**15, 96),
    ],
)
def test_resolve_group_size(in_features, requested, expected):
    assert k.resolve_group_size(in_features, requested) == expected


@pytest.mark.parity("P6")
@pytest.mark.parametrize(("in_features", "requested"), [(1000, 128), (1152, 31), (48, 64)])
def test_resolve_group_size_refuses(in_features, requested):
    with pytest.raises(ValueError, match=f"divides K={in_features}"):
        k.resolve_group_size(in_features, requested)


def test_columns_that_weigh_more_are_held_closer(generator):
    """The error as weighed falls, at the price of the plain one; where all weigh 3 the search loses nothing."""
    weight = torch.randn(64, 128, generator=generator)
    order = torch.randperm(128, generator=generator)
    importance = torch.logspace(-2, 2, 128)[order]

    def error(columns, weighs):
        found = k.quantize_weight_w4p(weight, 64, columns).dequantize()
        return float(((found - weight).double().square() * weighs).sum())

    ones = torch.ones(128)
    assert error(importance, importance) < 0.9 * error(None, importance)
    assert error(importance, ones) > error(None, ones)
    assert error(3 * ones, ones) <= error(
        None, ones
    )  # all ranges of the plain search, and finer ones
