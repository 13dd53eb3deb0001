"""Scales and codes against an independent numpy version, hand-worked numbers and edges."""

import numpy as np
import pytest
import torch

import ditq_kernels as k


def numpy_symmetric(x):
    """One row: the rules written out in numpy fp32 (whose division and rint are IEEE)."""
    x = x.astype(np.float32)
    scale = np.maximum(np.abs(x).max() / np.float32(127), np.float32(2.0**-40))
    inv = np.float32(1) / scale
    return np.clip(np.rint(x * inv), -127, 127).astype(np.int64), scale


def numpy_asymmetric(x):
    x = x.astype(np.float32)
    low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = np.maximum((high - low) / np.float32(255), np.float32(2.0**-40))
    inv = np.float32(1) / scale
    zero = int(np.clip(np.rint(-low * inv), 0, 255))
    code = zero + np.clip(np.rint(x * inv), -zero, 255 - zero).astype(np.int64)
    return code - 128, scale, zero - 128


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 3e4, 1e30])
def test_symmetric_equals_numpy(magnitude, generator):
    x = torch.randn(64, 333, generator=generator) * magnitude
    scale = k.symmetric_scale(x.abs().amax(dim=1))
    q = k.quantize_symmetric(x, scale[:, None])
    for row in range(len(x)):
        codes, step = numpy_symmetric(x[row].numpy())
        assert scale[row].item() == step
        np.testing.assert_array_equal(q[row].numpy(), codes)


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.7, 3.0])  # all negative, mixed, all positive
def test_asymmetric_equals_numpy(shift, generator):
    x = torch.rand(64, 333, generator=generator) * 2 - 1 + shift
    scale, zero_point = k.asymmetric_scale(x.amin(dim=1), x.amax(dim=1))
    q = k.quantize_asymmetric(x, scale[:, None], zero_point[:, None])
    assert zero_point.dtype == torch.int32
    for row in range(len(x)):
        codes, step, zero = numpy_asymmetric(x[row].numpy())
        assert (scale[row].item(), zero_point[row].item()) == (step, zero)
        np.testing.assert_array_equal(q[row].numpy(), codes)


@pytest.mark.parity("P4")
def test_ties_round_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    q = k.quantize_symmetric(x, torch.tensor(1.0))
    assert q.tolist() == [0, 2, 2, 0, -2, -2, 126]


def test_zero_point_is_added_after_rounding():
    x = torch.tensor([0.5, 1.5, -0.5])  # rounding after adding 1 would give 2, 2, 0
    q = k.quantize_asymmetric(x, torch.tensor(1.0), torch.tensor(1, dtype=torch.int32))
    assert q.tolist() == [1, 3, 1]


def test_codes_multiply_by_the_reciprocal():
    scale, x = torch.tensor([1.274, 0.352]), torch.tensor([37.583, 3.3439999])
    assert torch.round(x / scale).tolist() == [29.0, 10.0]  # what dividing would give
    assert k.quantize_symmetric(x, scale).tolist() == [30, 9]
    zero_point = torch.tensor(0, dtype=torch.int32)
    assert k.quantize_asymmetric(x, scale, zero_point).tolist() == [30, 9]


@pytest.mark.parity("P4")
def test_the_largest_element_gets_code_127(generator):
    x = torch.randn(2000, 16, generator=generator) * 10 ** (torch.rand(2000, 1) * 12 - 6)
    q = k.quantize_symmetric(x, k.symmetric_scale(x.abs().amax(dim=1))[:, None])
    assert (q.abs().amax(dim=1) == 127).all()


@pytest.mark.parity("P4")
def test_all_zero_rows_have_the_smallest_scale_and_code_zero():
    zeros = torch.zeros(3)
    assert k.symmetric_scale(zeros).tolist() == [2.0**-40] * 3
    scale, zero_point = k.asymmetric_scale(zeros, zeros)
    assert scale.tolist() == [2.0**-40] * 3
    assert k.quantize_asymmetric(zeros, scale, zero_point).tolist() == zero_point.tolist()


@pytest.mark.parity("P4")
@pytest.mark.parametrize(
    ("low", "high", "zero"), [(1.0, 2.0, -128), (-2.0, -1.0, 127), (-1.0, 254.0, -127)]
)
def test_zero_is_inside_every_asymmetric_range(low, high, zero):
    _, zero_point = k.asymmetric_scale(torch.tensor(low), torch.tensor(high))
    assert zero_point.item() == zero  # (-1, 254): scale 1, zero has code 1, stored 1 - 128


def test_out_of_range_values_clamp():
    huge = torch.tensor([3e38, -3e38, 1e9, -1e9])
    assert k.quantize_symmetric(huge, torch.tensor(1e-3)).tolist() == [127, -127, 127, -127]
    zero_point = torch.tensor(-100, dtype=torch.int32)
    q = k.quantize_asymmetric(huge, torch.tensor(1e-3), zero_point)
    assert q.tolist() == [127, -128, 127, -128]


def test_error_is_at_most_half_a_step(generator):
    x = torch.randn(100, 200, generator=generator).double()
    scale, zero_point = k.asymmetric_scale(x.amin(dim=1).float(), x.amax(dim=1).float())
    q = k.quantize_asymmetric(x.float(), scale[:, None], zero_point[:, None])
    back = k.dequantize(q, scale[:, None], zero_point[:, None]).double()
    # 0.5 step of rounding; the ends of the range may miss by the rounding of zero_point, 0.5 more
    assert ((back - x).abs() <= scale[:, None].double() * 1.0001).all()
    inside = (q > -128) & (q < 127)
    assert (
        (back - x).abs()[inside] <= (0.5001 * scale[:, None].double()).expand_as(x)[inside]
    ).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(dtype, generator):
    x = torch.randn(50, 64, generator=generator).to(dtype)
    scale = k.symmetric_scale(x.abs().amax(dim=1))
    assert scale.dtype == torch.float32
    assert torch.equal(scale, k.symmetric_scale(x.float().abs().amax(dim=1)))
    q = k.quantize_symmetric(x, scale[:, None])
    assert torch.equal(q, k.quantize_symmetric(x.float(), scale[:, None]))
