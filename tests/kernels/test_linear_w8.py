"""Weight-only int8 linear: fp64 oracle, exact row folds."""

import pytest
import torch

import ditq_kernels as k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_fp64(dtype, batch, generator):
    x = torch.randn(batch, 1152, generator=generator).to(dtype)
    w = k.quantize_weight_w8(torch.randn(96, 1152, generator=generator))
    bias = torch.randn(96, generator=generator)
    y = k.linear_w8(x, w.qweight, w.scale, bias)
    exact = (x.double() @ w.qweight.double().t()) * w.scale.double() + bias.double()
    # 1152 fp32 products and sums: at most 1152 * 2**-24 of the sum of magnitudes, plus 3 roundings
    magnitude = (x.double().abs() @ w.qweight.double().abs().t()) * w.scale.double()
    assert ((y - exact).abs() <= 1155 * 2**-24 * (magnitude + bias.double().abs())).all()


def test_row_folds_by_powers_of_two_commute_exactly(generator):
    x, weight = torch.randn(2, 64, generator=generator), torch.randn(32, 64, generator=generator)
    factor = 2.0 ** torch.randint(-9, 9, (32,), generator=generator)
    plain, folded = k.quantize_weight_w8(weight), k.quantize_weight_w8(weight * factor[:, None])
    y = k.linear_w8(x, plain.qweight, plain.scale)
    assert torch.equal(y * factor, k.linear_w8(x, folded.qweight, folded.scale))


def test_out_dtype_is_rounded_last(generator):
    x, w = torch.randn(2, 64, generator=generator), k.quantize_weight_w8(torch.eye(64))
    y = k.linear_w8(x, w.qweight, w.scale)
    half = k.linear_w8(x, w.qweight, w.scale, out_dtype=torch.bfloat16)
    assert torch.equal(half, y.bfloat16())


@pytest.mark.gpu
def test_runs_on_gpu(generator):
    x = torch.randn(2, 1152, generator=generator).cuda()
    w = k.quantize_weight_w8(torch.randn(6912, 1152, generator=generator).cuda())
    y = k.linear_w8(x, w.qweight, w.scale)
    torch.testing.assert_close(y, x @ w.dequantize().t(), rtol=1e-4, atol=1e-3)
