"""Weight-only int4 linear with a scale per group: fp64 within the roundings of a sum, and exact row folds."""

import pytest
import torch

import ditq_kernels as k

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("group_size", [32, 96, 288])
@pytest.mark.parametrize("out_dtype", UNIT)
def test_equals_fp64_on_the_real_weights(group_size, out_dtype, generator):
    x = torch.randn(3, 288, generator=generator)
    w = k.quantize_weight_w4g(torch.randn(50, 288, generator=generator), group_size)
    bias = torch.randn(50, generator=generator)
    y = k.linear_w4_per_group(x, w.packed, w.scale, w.weight_zero, bias, out_dtype=out_dtype)
    steps = (
        k.unpack_int4(w.packed).double().view(50, -1, group_size)
        - w.weight_zero.double()[..., None]
    )
    weight = (steps * w.scale.double()[..., None]).view(50, 288)
    truth = x.double() @ weight.t() + bias.double()
    # one rounding a weight, and a sum of K fp32 products errs by at most K roundings of the sum of magnitudes
    bound = 2.0**-24 * (288 + 3) * (x.double().abs() @ weight.abs().t() + bias.double().abs())
    assert y.dtype == out_dtype
    assert ((y.double() - truth).abs() <= bound + UNIT[out_dtype] * truth.abs() * 1.001).all()


def test_rows_times_powers_of_two_commute_exactly(generator):
    x = torch.randn(3, 64, generator=generator)
    w = k.quantize_weight_w4g(torch.randn(20, 64, generator=generator), 32)
    factor = 2.0 ** torch.randint(-9, 9, (20,), generator=generator)
    plain = k.linear_w4_per_group(x, w.packed, w.scale, w.weight_zero)
    folded = k.linear_w4_per_group(x, w.packed, w.scale * factor[:, None], w.weight_zero)
    assert torch.equal(plain * factor, folded)


def test_opcheck(generator):
    w = k.quantize_weight_w4g(torch.randn(20, 64, generator=generator), 32)
    op = torch.ops.ditq.linear_w4_per_group.default
    for bias in (None, torch.randn(20)):
        torch.library.opcheck(
            op, (torch.randn(3, 64), w.packed, w.scale, w.weight_zero, bias, torch.float16)
        )
