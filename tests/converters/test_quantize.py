"""The lossy step: bounded error, static ranges by hand, and the stored bytes mean what the converter meant (P24)."""

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_converters.convert.fold import LinearTensors
from ditq_converters.convert.quantize import quantize_linear, quantizer_tensors, static_range
from ditq_converters.methods import Transform
from ditq_runtime.format.layer import LayerFormat


def linear(rows=24, inputs=96, bias=True, seed=0):
    """A weight with an outlier row, an outlier column and a dead row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    weight[3] *= 40
    weight[:, 5] *= 15
    weight[7] = 0
    return LinearTensors(
        weight, torch.randn(1, rows, generator=generator).double() if bias else None
    )


def by_numpy(stored, group_size=None):
    """Real weights from the stored bytes, following docs: code, group scale and offset, channel scale."""
    codes = stored["weight"].numpy()
    if group_size is not None:
        nibbles = np.empty((codes.shape[0], 2 * codes.shape[1]), dtype=np.int32)
        nibbles[:, 0::2], nibbles[:, 1::2] = codes % 16, codes // 16
        scale = np.repeat(stored["group_scale"].numpy().astype(np.int32), group_size, axis=1)
        offset = np.repeat(stored["group_offset"].numpy().astype(np.int32), group_size, axis=1)
        codes = nibbles * scale + offset
    return codes.astype(np.int32), codes.astype(np.float32) * stored["weight_scale"].numpy()[
        :, None
    ]


def test_w8_codes_equal_numpy_and_err_by_half_a_step():
    source = linear()
    stored = quantize_linear(source, LayerFormat("w8", "token"))
    weight = source.weight.float().numpy()
    scale = np.maximum(np.abs(weight).max(1) / np.float32(127), np.float32(2.0**-40))
    codes = np.clip(np.rint(weight * (np.float32(1) / scale)[:, None]), -127, 127)
    assert np.array_equal(stored["weight_scale"].numpy(), scale)
    assert np.array_equal(stored["weight"].numpy(), codes)
    # half a step, plus the rounding of 1 / scale and of the product: 127 * 2 * 2^-24 steps
    error = np.abs(by_numpy(stored)[1].astype(np.float64) - weight)
    assert (error <= scale[:, None].astype(np.float64) * (0.5 + 127 * 2.0**-22)).all()


@pytest.mark.parametrize("group_size", [32, 96])
def test_w4p_bytes_mean_what_the_quantizer_meant(group_size):
    source = linear()
    layer_format = LayerFormat("w4p", "token", group_size)
    stored = quantize_linear(source, layer_format)
    codes, real = by_numpy(stored, group_size)
    assert np.abs(codes).max() <= 127
    meant = k.quantize_weight_w4p(source.weight.float(), group_size).dequantize()
    assert np.array_equal(real, meant.numpy())
    # groups without an outlier: 15 steps over a group's range, an integer step of at least 1/127 of the row
    row_scale = stored["weight_scale"].double()[:, None]
    error = torch.from_numpy(real).double() - source.weight
    steps = torch.from_numpy(np.repeat(stored["group_scale"].numpy(), group_size, axis=1)).double()
    inside = error.abs() <= row_scale * (steps / 2 + 1.001)
    # the search may clip the ends of a range: to 0.75 of it, so few values lie beyond half a step
    assert inside.double().mean() > 0.95
    assert float(error.norm() / source.weight.norm()) < 0.12


@pytest.mark.parametrize("weights", ["w8", "w4p"])
@pytest.mark.parametrize("activations", ["token", "token_asym", "static", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_stored_tensors_are_those_of_the_format(weights, activations, bias):
    group = 32 if weights == "w4p" else None
    layer_format = LayerFormat(weights, activations, group, bias)
    stored = quantize_linear(linear(bias=bias), layer_format)
    expected = layer_format.tensors(96, 24)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()} == expected
    assert all(tensor.is_contiguous() for tensor in stored.values())


@pytest.mark.parametrize("group_size", [None, 32])
def test_static_layers_store_scale_zero_and_row_sums(group_size):
    layer_format = LayerFormat("w4p" if group_size else "w8", "static", group_size)
    limits = (torch.tensor(-1.0), torch.tensor(3.0))
    stored = quantize_linear(linear(), layer_format) | quantizer_tensors(limits, None)
    # step 4 / 255; the code of zero is round(1 / step) = round(63.75) = 64, stored 64 - 128
    assert stored["act_scale"].item() == float(np.float32(4) / np.float32(255))
    assert stored["act_zero"].item() == -64
    codes, _ = by_numpy(stored, group_size)
    assert np.array_equal(stored["weight_sum"].numpy(), codes.sum(1))


def test_fp32_layers_store_the_folded_weight():
    source = linear()
    stored = quantize_linear(source, LayerFormat("fp32", "none"))
    assert torch.equal(stored["weight"], source.weight.float())
    assert torch.equal(stored["bias"], source.bias[0].float())
    assert sorted(stored) == ["bias", "weight"]


def test_what_the_quantizer_applies_is_stored_in_fp32_by_rising_timestep():
    s = torch.linspace(1e-4, 1e4, 96, dtype=torch.float64)
    shift = torch.arange(3 * 96, dtype=torch.float64).reshape(3, 96)
    stored = quantizer_tensors(None, Transform(s, shift))
    assert torch.equal(stored["smooth_inv"], (1 / s).float())
    assert torch.equal(stored["shift"], shift[[2, 1, 0]].float())
    assert [*quantizer_tensors(None, Transform(s))] == ["smooth_inv"]


def test_static_range_by_hand():
    low = torch.tensor([[-4.0, -1.0], [-2.0, -3.0]])
    high = torch.tensor([[1.0, 5.0], [8.0, 0.5]])
    assert static_range(low, high, Transform(), (0, 0)) == (-4.0, 8.0)
    # divided by (2, 0.5): minima -2, -6; maxima 4, 10
    smooth = Transform(torch.tensor([2.0, 0.5], dtype=torch.float64))
    assert static_range(low, high, smooth, (0, 0)) == (-6.0, 10.0)
    assert static_range(low, high, smooth, (0, 0))[0].dtype == torch.float32
    # minus (1, 2) in the first call, minus (0, -1) in the second: minima -5, -3, -2, -2; maxima 0, 3, 8, 1.5
    shift = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
    assert static_range(low, high, Transform(None, shift), (0, 1)) == (-5.0, 8.0)
    assert static_range(low, high, Transform(None, shift[:1]), (0, 0)) == (-5.0, 7.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e39])
@pytest.mark.parametrize("weights", ["w8", "w4p", "fp32"])
def test_weights_that_are_not_finite_in_fp32_are_refused(value, weights):
    source = linear()
    source.weight[2, 2] = value
    layer_format = LayerFormat(weights, "none", 32 if weights == "w4p" else None)
    with pytest.raises(ValueError, match="finite"):
        quantize_linear(source, layer_format)


def test_a_bias_that_is_not_finite_is_refused():
    source = linear()
    source.bias[0, 2] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        quantize_linear(source, LayerFormat("w8", "token"))
