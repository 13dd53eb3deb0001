"""The kernel that only a GPU is asked about leaves the bits of the one that ops run."""

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import gemm_w4a8_unswapped
from ditq_kernels.launch.tuning import TileConfig


def operands(in_features, generator, device):
    q = torch.randint(-128, 128, (21, in_features), generator=generator, dtype=torch.int8)
    w4 = k.quantize_weight_w4p(torch.randn(33, in_features, generator=generator), 32)
    scale, bias = torch.rand(21, generator=generator), torch.randn(33, generator=generator)
    parts = (q, w4.packed, scale, w4.group_scale, w4.group_offset, w4.scale, bias)
    return [part.to(device) for part in parts]


@pytest.mark.usefixtures("poisoned")
def test_bits_of_the_op(generator, device):
    arguments = operands(192, generator, device)
    got = gemm_w4a8_unswapped.launch(
        *arguments, torch.float32, config=TileConfig(16, 32, 128, 4, 2)
    )
    expected = k.gemm_w4a8(*(part.cpu() for part in arguments))
    assert torch.equal(got.cpu(), expected)


def test_other_inputs_are_refused(generator, device):
    with pytest.raises(ValueError, match="K must be a multiple of 64, got 96"):
        gemm_w4a8_unswapped.launch(*operands(96, generator, device), torch.float32)
