"""Int4 weights per group: an independent numpy version, error of half a step, exact row folds, refusals."""

import math

import numpy as np
import pytest
import torch

import ditq_kernels as k


def by_numpy(group, symmetric):
    """Codes, scale and zero point of one group: the rules written out in numpy fp32."""
    tiny = np.float32(2.0**-40)
    if symmetric:
        scale, zero = np.maximum(np.abs(group).max() / np.float32(7), tiny), 8
    else:
        low, high = min(np.float32(0), group.min()), max(np.float32(0), group.max())
        scale = np.maximum((high - low) / np.float32(15), tiny)
        zero = int(np.clip(np.rint(-low * (np.float32(1) / scale)), 0, 15))
    codes = np.clip(zero + np.rint(group * (np.float32(1) / scale)), 0, 15)
    return codes.astype(np.uint8), scale, zero


def awkward(rows, inputs, generator):
    """Zero rows, rows of one sign, an outlier, ties."""
    weight = torch.randn(rows, inputs, generator=generator)
    weight[0] = 0
    weight[1], weight[2] = weight[1].abs() + 1, -weight[2].abs() - 1
    weight[3, 5] = 100
    weight[4] = torch.arange(inputs) % 16 - 7.5
    return weight


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 96, 192])
def test_equals_numpy_and_errs_by_half_a_step(group_size, symmetric, generator):
    weight = awkward(20, 192, generator)
    w = k.quantize_weight_w4g(weight, group_size, symmetric)
    codes = k.unpack_int4(w.packed).view(20, -1, group_size).numpy()
    for row in range(20):
        for j, group in enumerate(weight[row].view(-1, group_size).numpy()):
            expected, scale, zero = by_numpy(group, symmetric)
            assert np.array_equal(codes[row, j], expected)
            assert (w.scale[row, j].item(), w.weight_zero[row, j].item()) == (scale, zero)
    real = (codes - w.weight_zero[..., None].double().numpy()) * w.scale[..., None].double().numpy()
    error = np.abs(real.reshape(20, 192) - weight.double().numpy())
    step = w.scale.double().repeat_interleave(group_size, 1).numpy()
    # half a step for the code; half more at a range end, where the rounded zero point shifts an asymmetric range
    assert (error <= step * (0.5 if symmetric else 1.0) * 1.00001).all()
    assert (error.reshape(20, -1)[0] == 0).all()


def test_symmetric_codes_leave_out_the_lowest(generator):
    w = k.quantize_weight_w4g(-torch.rand(8, 64, generator=generator), 64, symmetric=True)
    codes = k.unpack_int4(w.packed)
    assert (int(codes.min()), int(codes.max())) == (1, 8)  # -7..0 around 8
    assert (w.weight_zero == 8).all()
    assert w.expand().abs().max() == 7


def test_dequantized_by_hand():
    codes = torch.tensor([[0, 15, 8, 3] * 16], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[8, 3]], dtype=torch.uint8)
    w = k.W4G(k.pack_int4(codes), scale, zero)
    assert w.packed[0, :2].tolist() == [0xF0, 0x38]
    assert w.expand()[0, :4].tolist() == [-8, 7, 0, -5]
    assert w.dequantize()[0, :4].tolist() == [-4.0, 3.5, 0.0, -2.5]
    assert w.dequantize()[0, -4:].tolist() == [-6.0, 24.0, 10.0, 0.0]
    assert w.weight_sum().tolist() == [[8 * (-8 + 7 + 0 - 5), 8 * (-3 + 12 + 5 + 0)]]


def test_two_views_of_a_byte():
    """All 256 bytes: offset binary with zero point 8 is two's complement after a flip of both top bits."""
    packed = torch.arange(256, dtype=torch.uint8).view(1, 256)
    steps = k.expand_w4g(packed, torch.full((1, 1), 8, dtype=torch.uint8))[0]
    flipped = (packed[0] ^ 0x88).view(torch.int8).int()
    assert torch.equal(steps[0::2].int(), (flipped << 28) >> 28)
    assert torch.equal(steps[1::2].int(), flipped >> 4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_times_powers_of_two_commute_exactly(symmetric, generator):
    weight = torch.randn(64, 96, generator=generator)
    factor = 2.0 ** torch.randint(-12, 12, (64,), generator=generator)
    plain = k.quantize_weight_w4g(weight, 32, symmetric)
    folded = k.quantize_weight_w4g(weight * factor[:, None], 32, symmetric)
    assert torch.equal(plain.packed, folded.packed)
    assert torch.equal(plain.weight_zero, folded.weight_zero)
    assert torch.equal(plain.scale * factor[:, None], folded.scale)


# the same study as for w4p, in another program: asymmetric min-max groups on Gaussians, 20.8 dB at 64
def test_it_reaches_the_expected_accuracy():
    weight = torch.randn(1152, 4608, generator=torch.Generator().manual_seed(0)) * 0.02
    noise = k.quantize_weight_w4g(weight, 64).dequantize().double() - weight.double()
    assert abs(10 * math.log10(weight.double().square().sum() / noise.square().sum()) - 20.8) < 0.15


@pytest.mark.parity("P20")
def test_groups_beat_one_scale_per_row_where_outliers_are_scattered(generator):
    weight = torch.randn(64, 512, generator=generator)
    weight[torch.rand(64, 512, generator=generator) < 0.002] *= 30

    def error(group_size):
        real = k.quantize_weight_w4g(weight, group_size, symmetric=True).dequantize()
        return float((real - weight).norm())

    assert error(128) < 0.8 * error(512)


def test_other_weights_on_fixed_scales(generator):
    """Columns of the weight itself give its codes; others the nearest of 16 values."""
    weight = awkward(20, 96, generator)
    w = k.quantize_weight_w4g(weight, 32)
    columns = [w.nearest(weight[:, column], column) for column in range(96)]
    codes = torch.stack([code for code, _ in columns], dim=1)
    assert torch.equal(w.with_codes(codes).packed, w.packed)
    assert torch.equal(torch.stack([real for _, real in columns], dim=1), w.dequantize())
    values = torch.randn(20, generator=generator) * 3
    levels = (torch.arange(16) - w.weight_zero[:, 1, None].int()) * w.scale[:, 1, None]
    nearest = (levels - values[:, None]).abs().amin(dim=1)
    real = w.nearest(values, 40)[1]
    torch.testing.assert_close((real - values).abs(), nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("inputs", "size"), [(96, 64), (96, 0), (96, -32), (96, 48), (33, 33)])
def test_groups_that_do_not_fit_are_refused_by_sentence(inputs, size):
    with pytest.raises(
        ValueError, match=rf"quantize_weight_w4g: .* K={inputs}, group_size={size}; take resolve_g"
    ):
        k.quantize_weight_w4g(torch.ones(2, inputs), size)


def test_where_no_group_fits_a_row_is_one_group():
    assert k.resolve_group_size(48, 128, one_group=True) == 48
    assert k.resolve_group_size(1152, 128, one_group=True) == 128  # only then
    w = k.quantize_weight_w4g(torch.ones(2, 48), 48)
    assert (w.packed.shape, w.scale.shape) == ((2, 24), (2, 1))
    with pytest.raises(ValueError, match="divides K=33"):
        k.resolve_group_size(33, 128, one_group=True)


def test_weights_and_parts_are_refused_by_sentence():
    bad = torch.ones(2, 32)
    bad[1, 3] = torch.nan
    with pytest.raises(ValueError, match="quantize_weight_w4g: expected finite weights"):
        k.quantize_weight_w4g(bad, 32)
    zero = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match="expand_w4g: the number of groups must divide K, got K=64, J=3"
    ):
        k.expand_w4g(torch.zeros(2, 32, dtype=torch.uint8), zero)
