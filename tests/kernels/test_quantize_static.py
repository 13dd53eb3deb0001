"""Static quantization: the op's meaning, and its kernel against the reference, bit for bit."""

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import quantize_static as kernel
from ditq_kernels.launch.tuning import RowConfig
from ditq_kernels.reference import linear as reference


def int32(value):
    return torch.tensor([value], dtype=torch.int32)


def test_by_hand():
    x = torch.tensor([[0.5, 1.5, -0.5, 1e9, -1e9, 0.0]])
    q = k.quantize_static(x, torch.tensor([1.0]), int32(1))
    assert q.tolist() == [[1, 3, 1, 127, -128, 1]]


def test_smooth_inv_multiplies_first(generator):
    x, smooth_inv = torch.randn(5, 64, generator=generator), torch.rand(64, generator=generator)
    q = k.quantize_static(x, torch.tensor([0.01]), int32(-7), smooth_inv)
    assert torch.equal(q, k.quantize_static(x * smooth_inv, torch.tensor([0.01]), int32(-7)))


def test_a_scale_for_each_head_by_hand():
    x = torch.tensor([[1.0, -1.5, 1.0, -1.5], [1e9, 0.0, -1e9, 0.25]])
    q = k.quantize_static(x, torch.tensor([0.5, 0.25]))
    assert q.tolist() == [[2, -3, 4, -6], [127, 0, -128, 1]]


@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 128), (31, 64), (33, 72)])
@pytest.mark.usefixtures("poisoned")
def test_narrow_rows_share_a_program(num_tokens, head_dim, device, generator):
    """A row for each head of a token, 32 a program, as the tables of GPUs have it."""
    x = (torch.randn(num_tokens, head_dim, generator=generator) * 3).to(device)
    scale, zero = torch.tensor([0.03], device=device), int32(5).to(device)
    found = kernel.launch(x, scale, zero, None, config=RowConfig(32, 4))
    assert torch.equal(found, reference.quantize_static(x, scale, zero, None))


@pytest.mark.parametrize("zero_point", [None, -128, 33])
@pytest.mark.parametrize(
    ("num_tokens", "heads", "head_dim"),
    [(1, 2, 32), (5, 16, 72), (33, 3, 88), (9, 1, 128), (7, 5, 1)],
)
@pytest.mark.usefixtures("poisoned")
def test_kernel_quantizes_heads_one_by_one(
    num_tokens, heads, head_dim, zero_point, device, generator
):
    """The kernel and the reference give each head the codes it has alone: reciprocals are rounded once."""
    x = (torch.randn(num_tokens, heads * head_dim, generator=generator) * 3).to(device)
    x[0, 0], x[-1, -1] = 1e9, -1e9
    scale = (torch.rand(heads, generator=generator) * 0.1 + 0.003).to(device)
    zero = None if zero_point is None else int32(zero_point).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        rows = x.to(dtype)
        alone = [
            reference.quantize_static(head, step, int32(zero_point or 0).to(device), None)
            for head, step in zip(rows.split(head_dim, 1), scale.split(1), strict=True)
        ]
        expected = torch.cat(alone, 1)
        assert torch.equal(kernel.launch(rows, scale, zero, None), expected)
        assert torch.equal(reference.quantize_static(rows, scale, zero, None), expected)


@pytest.mark.parametrize(("num_tokens", "in_features"), [(1, 64), (5, 1152), (33, 1000), (9, 1)])
@pytest.mark.parametrize("zero_point", [-128, 0, 33, 127])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # 3e38 * 16, interpreted
@pytest.mark.usefixtures("poisoned")
def test_kernel_equals_reference(num_tokens, in_features, zero_point, device, generator):
    x = (torch.randn(num_tokens, in_features, generator=generator) * 3).to(device)
    x[0, 0], x[-1, -1] = 3e38, -3e38
    x[0, in_features // 2] = 0.03125  # a tie: half a step
    smooth_inv = (torch.rand(in_features, generator=generator) + 0.1).to(device)
    for scale, smooth in ((0.0625, None), (0.0173, smooth_inv)):
        args = (torch.tensor([scale], device=device), int32(zero_point).to(device), smooth)
        for dtype in (torch.float32, torch.bfloat16):
            q = kernel.launch(x.to(dtype), *args)
            assert torch.equal(q, reference.quantize_static(x.to(dtype), *args))


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_height(rows, device, generator):
    x = torch.randn(11, 96, generator=generator).to(device)[:, 5:90]
    args = (torch.tensor([0.02], device=device), int32(5).to(device), None)
    q = kernel.launch(x, *args, config=RowConfig(rows=rows, num_warps=4))
    assert torch.equal(q, reference.quantize_static(x, *args))


@pytest.mark.parametrize(("num_tokens", "samples"), [(1, 1), (6, 3), (33, 3), (5, 5), (4, None)])
@pytest.mark.usefixtures("poisoned")
def test_kernel_shifts_first(num_tokens, samples, device, generator):
    """As the same kernel on what is shifted before, one fp32 rounding; with one scale and with heads."""
    x = torch.randn(num_tokens, 96, generator=generator).bfloat16()
    shifts = torch.randn(1 if samples is None else 4, 96, generator=generator)
    index = None if samples is None else torch.randint(4, (samples,), generator=generator)
    row = shifts[0] if index is None else shifts[index].repeat_interleave(num_tokens // samples, 0)
    smooth_inv = torch.rand(96, generator=generator) + 0.1
    for scale, zero in ((torch.tensor([0.02]), int32(5)), (torch.rand(4) * 0.1 + 0.01, None)):
        arguments = [x, scale, zero, smooth_inv, shifts, index]
        moved = [None if value is None else value.to(device) for value in arguments]
        expected = k.quantize_static((x.float() - row) * smooth_inv, scale, zero)
        assert torch.equal(kernel.launch(*moved).cpu(), expected)
        named = {"group_shift": shifts, "group_index": index}
        assert torch.equal(k.quantize_static(*arguments[:4], **named), expected)


def test_no_tokens(device):
    args = (torch.tensor([0.02], device=device), int32(5).to(device), None)
    assert kernel.launch(torch.empty(0, 64, device=device), *args).shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "in_features"), [(512, 1152), (8192, 4608)])
@pytest.mark.usefixtures("poisoned")
def test_op_on_gpu_equals_reference(num_tokens, in_features, generator):
    x = torch.randn(num_tokens, in_features, generator=generator) * 3
    args = (torch.tensor([0.0317]), int32(-21))
    q = k.quantize_static(x.cuda(), *(arg.cuda() for arg in args))
    assert torch.equal(q.cpu(), k.quantize_static(x, *args))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
def test_a_scale_for_each_head_on_gpu_equals_reference(generator):
    x, scale = torch.randn(8192, 1152, generator=generator) * 3, torch.rand(16) * 0.1 + 0.003
    assert torch.equal(k.quantize_static(x.cuda(), scale.cuda()).cpu(), k.quantize_static(x, scale))
