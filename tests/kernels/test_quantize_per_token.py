"""Per-token quantization: the op's meaning, and its kernel against the reference, bit for bit."""

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import quantize_per_token as kernel
from ditq_kernels.launch.tuning import RowConfig
from ditq_kernels.reference import linear as reference


def hard_activations(num_tokens, in_features, dtype, generator):
    x = torch.randn(num_tokens, in_features, generator=generator)
    x[:, in_features // 3] *= 80  # an outlier channel, as DiT has
    x[0] = 0
    if num_tokens > 3:
        x[1] = torch.arange(in_features) % 255 - 127.0  # exact codes
        x[2] = x[1].clamp(-126, 126) + 0.5  # ties
        x[2, 0] = 127
        x[3] *= 1e-20  # below MIN_SCALE
    return x.to(dtype)


def test_by_hand():
    q, scale = k.quantize_per_token(torch.tensor([[0.5, 1.5, -127.0], [0.0, 0.0, 0.0]]))
    assert q.tolist() == [[0, 2, -127], [0, 0, 0]]
    assert scale.tolist() == [1.0, 2.0**-40]


def test_smooth_inv_multiplies_first(generator):
    x, smooth_inv = torch.randn(5, 64, generator=generator), torch.rand(64, generator=generator)
    q, scale = k.quantize_per_token(x, smooth_inv)
    expected_q, expected_scale = k.quantize_per_token(x * smooth_inv)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)


def test_rows_may_be_strided(generator):
    wide = torch.randn(7, 100, generator=generator)
    q, scale = k.quantize_per_token(wide[:, 10:74])
    expected_q, expected_scale = k.quantize_per_token(wide[:, 10:74].contiguous())
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)
    assert q.is_contiguous()


# one, odd, off-tile; widths of one part, two parts, padded; every dtype
@pytest.mark.parametrize(
    ("num_tokens", "in_features"), [(1, 64), (5, 1152), (33, 1000), (9, 1), (6, 33)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_kernel_equals_reference(num_tokens, in_features, dtype, device, generator):
    x = hard_activations(num_tokens, in_features, dtype, generator).to(device)
    smooth_inv = (torch.rand(in_features, generator=generator) + 0.1).to(device)
    for smooth in (None, smooth_inv):
        q, scale = kernel.launch(x, smooth)
        expected_q, expected_scale = reference.quantize_per_token(x, smooth)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(q, expected_q)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_height(rows, device, generator):
    x = hard_activations(11, 96, torch.float32, generator).to(device)[:, 5:90]
    q, scale = kernel.launch(x, None, config=RowConfig(rows=rows, num_warps=4))
    expected_q, expected_scale = reference.quantize_per_token(x, None)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q, expected_q)


def test_no_tokens(device):
    q, scale = kernel.launch(torch.empty(0, 64, device=device), None)
    assert (q.shape, scale.shape) == ((0, 64), (0,))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "in_features"), [(512, 1152), (8192, 1152), (8192, 4608), (2, 6144)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_op_on_gpu_equals_reference(num_tokens, in_features, dtype, generator):
    x = hard_activations(num_tokens, in_features, dtype, generator)
    q, scale = k.quantize_per_token(x.cuda())
    expected_q, expected_scale = k.quantize_per_token(x)
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(q.cpu(), expected_q)
