"""GELU and a quantizer of rows: codes and scales against fp64, the reference against the unfused ops."""

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import gelu_quantize as kernel
from ditq_kernels.reference import fused as reference_fused
from ditq_kernels.reference import linear as reference

# exp2 and x * x run to infinity by design; only the interpreter says so
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

STATIC = (torch.tensor([0.02]), torch.tensor([-100], dtype=torch.int32))


def exact_gelu(x):
    x = x.double().numpy()
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def assert_right(q, scale, x, smooth_inv, zero_point):
    """Codes nearest to fp64 quotients by a scale that is itself within its roundings."""
    smooth = np.ones(x.shape[1]) if smooth_inv is None else smooth_inv.double().numpy()
    values = exact_gelu(x) * smooth
    # GELU errs by 2**-21 |x|; fp32 roundings by 2**-24 each
    error = 2.0**-21 * np.abs(x.double().numpy()) * smooth + 2.0**-24 * np.abs(values)
    zero = 0 if zero_point is None else zero_point.item()
    if zero_point is None:
        largest = np.abs(values).max(1)
        step = np.maximum(largest / 127, 2.0**-40)
        # a maximum errs by no more than the largest error of its row
        assert (np.abs(scale.double().numpy() - step) <= error.max(1) / 127 + 2.0**-24 * step).all()
    step = scale.double().numpy().reshape(-1, 1)
    exact = np.clip(values / step + zero, -128, 127)
    allowance = error / step + 3 * 2.0**-24 * np.abs(values / step)
    assert (np.abs(q.numpy() - exact) <= 0.5 + allowance).all()


@pytest.mark.parametrize(("num_tokens", "in_features"), [(1, 64), (5, 1152), (33, 100), (9, 1)])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_kernel_and_reference(num_tokens, in_features, static, dtype, device, generator):
    x = (torch.randn(num_tokens, in_features, generator=generator) * 4).to(dtype)
    smooth_inv = torch.rand(in_features, generator=generator) + 0.5
    given = STATIC if static else (None, None)
    for smooth in (None, smooth_inv):
        moved = [None if v is None else v.to(device) for v in (x, smooth, *given)]
        q, scale = (part.cpu() for part in kernel.launch(*moved)[:2])
        assert_right(q, STATIC[0] if static else scale, x, smooth, given[1])
        names = {"scale": given[0], "zero_point": given[1]}
        assert_right(*k.gelu_quantize(x, smooth, **names), x, smooth, given[1])


@pytest.mark.parametrize("static", [False, True])
def test_the_reference_is_the_unfused_ops_bit_for_bit(static, generator):
    x = torch.randn(5, 96, generator=generator)
    smooth_inv = torch.rand(96, generator=generator) + 0.5
    y = torch.nn.functional.gelu(x, approximate="tanh")
    if static:
        q, scale = k.gelu_quantize(x, smooth_inv, scale=STATIC[0], zero_point=STATIC[1])
        assert scale is STATIC[0]
        assert torch.equal(q, k.quantize_static(y, *STATIC, smooth_inv))
    else:
        assert all(
            map(torch.equal, k.gelu_quantize(x, smooth_inv), k.quantize_per_token(y, smooth_inv))
        )


@pytest.mark.parametrize("samples", [None, 2, 6])
def test_shifts_and_zero_points_are_those_of_the_unfused_ops(samples, generator):
    x = torch.randn(6, 96, generator=generator)
    smooth_inv = torch.rand(96, generator=generator) + 0.5
    y = torch.nn.functional.gelu(x, approximate="tanh")
    shift = {"group_shift": torch.randn(1 if samples is None else 3, 96, generator=generator)}
    if samples is not None:
        shift["group_index"] = torch.randint(3, (samples,), generator=generator)
    for asymmetric in (False, True):
        found = k.gelu_quantize(x, smooth_inv, asymmetric=asymmetric, **shift)
        expected = k.quantize_per_token(y, smooth_inv, asymmetric=asymmetric, **shift)
        assert len(found) == len(expected) == 2 + asymmetric
        assert all(map(torch.equal, found, expected))
    q, _ = k.gelu_quantize(x, smooth_inv, scale=STATIC[0], zero_point=STATIC[1], **shift)
    assert torch.equal(q, k.quantize_static(y, *STATIC, smooth_inv, **shift))


@pytest.mark.parametrize("samples", [None, 11, 33])
@pytest.mark.usefixtures("poisoned")
def test_kernel_shifts_and_gives_zero_points(samples, device, generator):
    """As the quantizers on the kernel's own GELU: the same row with a shift of zero and a step that keeps it."""
    x = (torch.randn(33, 100, generator=generator) * 4).to(device)
    shifts = torch.randn(1 if samples is None else 3, 100, generator=generator).to(device)
    index = (
        None if samples is None else torch.randint(3, (samples,), generator=generator).to(device)
    )
    y = reference_fused.gelu(x)
    for asymmetric in (False, True):
        q, scale, zero = kernel.launch(x, None, None, None, shifts, index, asymmetric)
        by_hand = reference.quantize_per_token(y, None, shifts, index, asymmetric)
        # GELU is within 2**-21 of |x|, so a scale is within that share of the largest |x|, and a code within one
        assert ((scale - by_hand[1]).abs() <= 2.0**-20 * x.abs().amax(1)).all()
        assert (q.int() - by_hand[0].int()).abs().max() <= 1
        assert zero.shape == ((33,) if asymmetric else (0,))
    given = [part.to(device) for part in STATIC]
    q, *_ = kernel.launch(x, None, *given, shifts, index)
    static = reference.quantize_static(y, *given, None, shifts, index)
    assert (q.int() - static.int()).abs().max() <= 1


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"^gelu_quantize: asymmetric asks for a zero point per"):
        k.gelu_quantize(x, scale=STATIC[0], zero_point=STATIC[1], asymmetric=True)
    with pytest.raises(ValueError, match=r"^gelu_quantize: .*zero_point is missing; pass both"):
        k.gelu_quantize(x, scale=torch.ones(1))
    with pytest.raises(ValueError, match=r"^gelu_quantize: smooth_inv must be \[32\] float32"):
        k.gelu_quantize(x, torch.ones(31))
    with pytest.raises(ValueError, match=r"^gelu_quantize: x must be \[T, K\]"):
        k.gelu_quantize(x[None])


@pytest.mark.gpu
@pytest.mark.parametrize("static", [False, True])
def test_op_on_gpu(static, generator):
    x = torch.randn(512, 4608, generator=generator) * 4
    given = STATIC if static else (None, None)
    q, scale, _ = kernel.launch(*(None if v is None else v.cuda() for v in (x, None, *given)))
    assert_right(q.cpu(), STATIC[0] if static else scale.cpu(), x, None, given[1])
