"""Weight-only progressive int4 linear: equal to linear_w8 on the expanded weights."""

import pytest
import torch

import ditq_kernels as k


@pytest.mark.parametrize("group_size", [32, 96])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_linear_w8_on_expanded_weights(group_size, out_dtype, generator):
    x = torch.randn(3, 288, generator=generator)
    w = k.quantize_weight_w4p(torch.randn(50, 288, generator=generator), group_size)
    bias = torch.randn(50, generator=generator)
    y = k.linear_w4(x, w.packed, w.group_scale, w.group_offset, w.scale, bias, out_dtype=out_dtype)
    assert torch.equal(y, k.linear_w8(x, w.expand(), w.scale, bias, out_dtype=out_dtype))
