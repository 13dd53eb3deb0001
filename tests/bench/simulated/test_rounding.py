"""Simulated quantizers against numpy and hand-worked numbers."""

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_bench.simulated.rounding import asymmetric, asymmetric_codes, ditas_code, symmetric


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("bits", [4, 8])
def test_asymmetric_is_the_quantizer_of_the_kernels(bits):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=generator) * 3 + 1
    low, high = x.min(), x.max() * 0.8  # the top clips
    found = asymmetric(x, low, high, bits)
    if bits == 8:
        scale, zero = k.asymmetric_scale(low, high)
        expected = k.dequantize(k.quantize_asymmetric(x, scale, zero), scale, zero)
        assert torch.equal(found, expected)
    levels = 2**bits - 1
    step = (high.item() - low.item()) / levels
    zero = np.rint(-low.item() / step)
    by_numpy = (np.clip(np.rint(x.double().numpy() / step) + zero, 0, levels) - zero) * step
    # fp32 against fp64: only a value within rounding of a tie may differ, none does here
    np.testing.assert_allclose(found.numpy(), by_numpy, rtol=0, atol=1e-5)
    assert len(found.unique()) <= 2**bits


def test_asymmetric_holds_zero():
    x = tensor(3.0, 5.0, 18.0)
    codes, zero, scale = asymmetric_codes(x, x.min(), x.max(), 4)
    assert (zero.item(), scale.item()) == (0.0, pytest.approx(1.2))
    assert codes.tolist() == [2, 4, 15]  # 2.5 ties to even
    assert asymmetric(tensor(0.0), x.min(), x.max(), 4).item() == 0


def test_symmetric_by_hand():
    x = tensor(-7.0, 3.4, 3.5, 2.5, 9.0)
    assert symmetric(x, tensor(-7.0), tensor(5.0), 4).tolist() == [-7, 3, 4, 2, 7]


def test_the_released_code_of_ditas_by_hand():
    """Range 16 at 4 bits: steps of 16 / 16 = 1 from 0, so the largest value, 16, clips to 15."""
    x = tensor(0.0, 0.4, 7.5, 15.4, 16.0)
    assert ditas_code(x, x.min(), x.max(), 4).tolist() == [0, 0, 8, 15, 15]
    # zero need not be inside: [10, 42], step 2, offset 10
    far = tensor(10.0, 11.1, 42.0)
    assert ditas_code(far, far.min(), far.max(), 4).tolist() == [10, 12, 40]
    same = tensor(3.0, 3.0)
    assert ditas_code(same, same.min(), same.max(), 4).tolist() == [3, 3]
