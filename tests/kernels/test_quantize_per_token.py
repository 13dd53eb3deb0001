"""Per-token quantization: the op's meaning, and its kernel against the reference, bit for bit."""

import re

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import quantize_per_token as kernel
from ditq_kernels.launch import tuning
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
        assert_same(kernel.launch(x, smooth), reference.quantize_per_token(x, smooth))


@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 128), (31, 64), (33, 72), (65, 256)])
@pytest.mark.usefixtures("poisoned")
def test_narrow_rows_share_a_program(num_tokens, head_dim, device, generator):
    """A row for each head of a token, 32 a program, as the tables of GPUs have it."""
    narrow = tuning.row_config("quantize_per_token", ("sm_90",), 8192, head_dim)
    assert narrow == RowConfig(32, 4)
    x = hard_activations(num_tokens, head_dim, torch.bfloat16, generator).to(device)
    expected = reference.quantize_per_token(x, None)
    assert_same(kernel.launch(x, None, config=narrow), expected)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_height(rows, device, generator):
    x = hard_activations(11, 96, torch.float32, generator).to(device)[:, 5:90]
    shifts, index = transform(85, 11, generator, device)[1:]
    config = RowConfig(rows=rows, num_warps=4)
    assert_same(kernel.launch(x, None, config=config), reference.quantize_per_token(x, None))
    arguments = (x, None, shifts, index, True)
    assert_same(kernel.launch(*arguments, config=config), reference.quantize_per_token(*arguments))


def test_no_tokens(device):
    q, scale, zero_point = kernel.launch(torch.empty(0, 64, device=device), None, asymmetric=True)
    assert (q.shape, scale.shape, zero_point.shape) == ((0, 64), (0,), (0,))


# samples of several programs, of a part of one, of one token; no index: one shift
@pytest.mark.parametrize(
    ("num_tokens", "in_features", "samples"),
    [(1, 64, 1), (6, 1152, 3), (15, 100, 3), (9, 1, 9), (6, 40, None)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_kernel_shifts_and_gives_zero_points(
    num_tokens, in_features, samples, dtype, device, generator
):
    x = hard_activations(num_tokens, in_features, dtype, generator).to(device)
    smooth_inv, shifts, index = transform(in_features, samples, generator, device)
    for asymmetric, smooth in ((False, smooth_inv), (True, None), (True, smooth_inv)):
        arguments = (x, smooth, shifts, index, asymmetric)
        assert_same(kernel.launch(*arguments), reference.quantize_per_token(*arguments))
    plain = (x, None, None, None, True)
    assert_same(kernel.launch(*plain), reference.quantize_per_token(*plain))


def transform(in_features, samples, generator, device):
    """smooth_inv, shifts of three groups and the groups of samples; without samples one shift for all."""
    smooth_inv = torch.rand(in_features, generator=generator) + 0.1
    shifts = torch.randn(1 if samples is None else 3, in_features, generator=generator)
    if samples is None:
        return smooth_inv.to(device), shifts.to(device), None
    index = torch.randint(3, (samples,), generator=generator)
    return smooth_inv.to(device), shifts.to(device), index.to(device)


def assert_same(found, expected):
    assert all(map(torch.equal, found, expected))
    assert [part.dtype for part in found] == [torch.int8, torch.float32, torch.int32]


def test_zero_points_by_hand():
    """Steps of one: [-5, 250], all positive, all negative, all zero, and a tie on each side of zero."""
    x = torch.tensor([[-5.0, 250.0, 0.0], [0.5, 255.0, 1.5], [-255.0, -0.5, -1.5], [0.0, 0.0, 0.0]])
    q, scale, zero_point = k.quantize_per_token(x, asymmetric=True)
    assert scale.tolist() == [1.0, 1.0, 1.0, 2.0**-40]
    assert zero_point.tolist() == [-123, -128, 127, -128]
    assert q.tolist() == [[-128, 127, -123], [-128, 127, -126], [-128, 127, 125], [-128] * 3]


def test_zero_points_against_fp64(generator):
    """A code is the nearest integer to x / scale + zero, up to the rounding of the scale and of three products."""
    x = hard_activations(33, 100, torch.float32, generator)
    x[4], x[5] = x[4].abs(), -x[5].abs()
    smooth_inv, shifts, index = transform(100, 11, generator, "cpu")
    q, scale, zero_point = k.quantize_per_token(
        x, smooth_inv, group_shift=shifts, group_index=index, asymmetric=True
    )
    shifted = x.double() - shifts.double()[index].repeat_interleave(3, 0)
    exact = shifted * smooth_inv.double()
    low, high = exact.amin(1).clamp(max=0), exact.amax(1).clamp(min=0)
    step = ((high - low) / 255).clamp(min=2.0**-40)
    # the shift and the smoothing round once each, by 2**-24 of their result; so do the range, its division and the
    # reciprocal: five roundings of something within the range, which is 255 steps
    unit = 255 * 5 * 2.0**-24
    assert ((scale.double() - step).abs() <= unit / 255 * step).all()
    ideal = exact / step[:, None] + (-low / step)[:, None].round() - 128
    assert ((q.double() - ideal).abs() <= 0.5 + 1 + unit).all()
    real = (q.double() - zero_point.double()[:, None]) * scale.double()[:, None]
    # at an end of the range the zero point's own rounding may cost another half of a step
    assert ((real - exact).abs() <= (1 + unit) * step[:, None]).all()
    assert zero_point.min() >= -128
    assert zero_point.max() <= 127


def test_the_shift_comes_first_and_rounds(generator):
    x = torch.randn(6, 64, generator=generator)
    smooth_inv, shifts, index = transform(64, 3, generator, "cpu")
    by_token = shifts[index].repeat_interleave(2, 0)
    found = k.quantize_per_token(x, smooth_inv, group_shift=shifts, group_index=index)
    assert all(map(torch.equal, found, k.quantize_per_token((x - by_token) * smooth_inv)))
    tokens = k.quantize_per_token(x, group_shift=shifts, group_index=index.repeat_interleave(2))
    assert all(map(torch.equal, tokens, k.quantize_per_token(x - by_token)))
    one = k.quantize_per_token(x, group_shift=shifts[1:2])
    assert all(map(torch.equal, one, k.quantize_per_token(x - shifts[1])))


REFUSALS = [
    ({"group_index": torch.zeros(3).long()}, "group_shift, which is missing"),
    ({"group_shift": torch.zeros(2, 64)}, "of 2 groups needs group_index, which is missing"),
    ({"group_shift": torch.zeros(1, 65)}, "group_shift must be [G, 64], got [1, 65]"),
    ({"group_shift": torch.zeros(64)}, "group_shift must be [G, K] float32, got [64]"),
    ({"group_shift": torch.zeros(2, 128)[:, :64]}, "group_shift must be contiguous"),
    (
        {"group_shift": torch.zeros(2, 64), "group_index": torch.zeros(4).long()},
        "group_index must have one entry for each sample, and samples equally many of the T=6 rows",
    ),
    (
        {"group_shift": torch.zeros(2, 64), "group_index": torch.zeros(3).int()},
        "group_index must be [3] int64, got [3] int32",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSALS)
def test_what_does_not_fit_is_refused(change, sentence):
    x = torch.zeros(6, 64)
    with pytest.raises(ValueError, match=f"^quantize_per_token: .*{re.escape(sentence)}"):
        k.quantize_per_token(x, **change)
    with pytest.raises(ValueError, match=f"^quantize_static: .*{re.escape(sentence)}"):
        k.quantize_static(x, torch.ones(1), **change)
    with pytest.raises(ValueError, match=f"^gelu_quantize: .*{re.escape(sentence)}"):
        k.gelu_quantize(x, **change)


def test_more_inputs_than_an_int32_sum_holds_are_refused():
    with pytest.raises(ValueError, match="K must be at most 65793"):
        k.quantize_per_token(torch.zeros(1, 65794), asymmetric=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "in_features"), [(512, 1152), (8192, 1152), (8192, 4608), (2, 6144)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_op_on_gpu_equals_reference(num_tokens, in_features, dtype, generator):
    x = hard_activations(num_tokens, in_features, dtype, generator)
    smooth_inv, shifts, index = transform(in_features, num_tokens // 2, generator, "cpu")
    for named in ({}, {"asymmetric": True, "group_shift": shifts, "group_index": index}):
        on_gpu = {n: v if v is True else v.cuda() for n, v in named.items()}
        found = k.quantize_per_token(x.cuda(), smooth_inv.cuda(), **on_gpu)
        expected = k.quantize_per_token(x, smooth_inv, **named)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
