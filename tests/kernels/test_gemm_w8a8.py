"""W8A8: the zero-point algebra in int64, the order of the epilogue, the kernel bit for bit."""

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import gemm_w8a8 as kernel
from ditq_kernels.checks import tensors as checks
from ditq_kernels.launch.tuning import TileConfig
from ditq_kernels.reference import linear as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def int8(shape, generator, low=-128):
    return torch.randint(low, 128, shape, generator=generator, dtype=torch.int8)


def problem(num_tokens, out_features, in_features, generator, asymmetric=True):
    """Arguments of reference and launch, without out_dtype."""
    q, weight = (
        int8((num_tokens, in_features), generator),
        int8((out_features, in_features), generator),
    )
    zero_point = torch.randint(-128, 128, (num_tokens,), generator=generator, dtype=torch.int32)
    return [
        q,
        weight,
        torch.rand(num_tokens, generator=generator) / 100,
        torch.rand(out_features, generator=generator) / 100,
        torch.randn(out_features, generator=generator),
        zero_point if asymmetric else None,
        weight.sum(dim=1, dtype=torch.int32) if asymmetric else None,
    ]


def direct_sums(q, weight, zero_point):
    """sum over k of (q - zero_point) * weight in numpy int64, the definition."""
    centred = q.numpy().astype(np.int64) - zero_point.numpy().astype(np.int64)[:, None]
    return centred @ weight.numpy().astype(np.int64).T


def to(device, arguments):
    return [None if value is None else value.to(device) for value in arguments]


@pytest.mark.parity("P5")
@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features"), [(1, 1, 1), (7, 5, 33), (16, 24, 1152)]
)
def test_zero_points_equal_direct_sums(num_tokens, out_features, in_features, generator):
    q, weight, *_, zero_point, weight_sum = problem(
        num_tokens, out_features, in_features, generator
    )
    ones_t, ones_n = torch.ones(num_tokens), torch.ones(out_features)
    y = k.gemm_w8a8(q, weight, ones_t, ones_n, zero_point=zero_point, weight_sum=weight_sum)
    # with unit scales y is the int32 sum rounded once to fp32
    expected = direct_sums(q, weight, zero_point).astype(np.float32)
    np.testing.assert_array_equal(y.numpy(), expected)


@pytest.mark.parity("P5")
@pytest.mark.parametrize(
    ("q_value", "w_value", "zero"), [(-128, -128, 127), (127, -128, -128), (127, 127, -128)]
)
def test_extremes_at_the_largest_k(q_value, w_value, zero):
    in_features = checks.MAX_K_ASYMMETRIC
    q = torch.full((1, in_features), q_value, dtype=torch.int8)
    weight = torch.full((2, in_features), w_value, dtype=torch.int8)
    weight_sum = weight.sum(dim=1, dtype=torch.int32)
    y = k.gemm_w8a8(
        q, weight, torch.ones(1), torch.ones(2),
        zero_point=torch.tensor([zero], dtype=torch.int32), weight_sum=weight_sum,
    )  # fmt: skip
    exact = (q_value - zero) * w_value * in_features
    assert abs(exact) < 2**31
    assert y.tolist() == [[float(np.float32(exact))] * 2]


@pytest.mark.parity("P5")
def test_the_largest_symmetric_k_does_not_wrap():
    in_features = checks.MAX_K_SYMMETRIC
    lowest = torch.full((1, in_features), -128, dtype=torch.int8)
    assert reference.integer_matmul(lowest, lowest).item() == 128 * 128 * in_features
    assert 128 * 128 * (in_features + 1) > 2**31 - 1  # the bound is tight


@pytest.mark.usefixtures("poisoned")
def test_kernel_at_the_largest_symmetric_k(device):
    in_features = checks.MAX_K_SYMMETRIC
    lowest = torch.full((3, in_features), -128, dtype=torch.int8, device=device)
    ones = torch.ones(3, device=device)
    tile = TileConfig(16, 16, 1024, 4, 2)
    y = kernel.launch(lowest, lowest, ones, ones, None, None, None, torch.float32, config=tile)
    assert y.tolist() == [[float(np.float32(128 * 128 * in_features))] * 3] * 3


@pytest.mark.parity("P7")
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_epilogue_order(out_dtype, generator):
    """numpy fp32, one rounding a step: scales, then the sum, then the bias, then the cast."""
    q, weight, scale, weight_scale, bias, zero_point, weight_sum = problem(9, 11, 640, generator)
    y = k.gemm_w8a8(
        q, weight, scale, weight_scale, bias,
        zero_point=zero_point, weight_sum=weight_sum, out_dtype=out_dtype,
    )  # fmt: skip
    step = scale.numpy()[:, None] * weight_scale.numpy()
    expected = direct_sums(q, weight, zero_point).astype(np.float32) * step
    expected = torch.from_numpy(expected + bias.numpy())
    assert torch.equal(y, expected.to(out_dtype))


def test_static_equals_per_token_bitwise(generator):
    q, weight, _, weight_scale, bias, *_ = problem(9, 11, 64, generator)
    one = torch.tensor([0.0173])
    y = k.gemm_w8a8(q, weight, one, weight_scale, bias)
    assert torch.equal(y, k.gemm_w8a8(q, weight, one.expand(9).contiguous(), weight_scale, bias))
    zero, weight_sum = torch.tensor([7], dtype=torch.int32), weight.sum(dim=1, dtype=torch.int32)
    y = k.gemm_w8a8(q, weight, one, weight_scale, zero_point=zero, weight_sum=weight_sum)
    zeros = zero.expand(9).contiguous()
    again = k.gemm_w8a8(q, weight, one, weight_scale, zero_point=zeros, weight_sum=weight_sum)
    assert torch.equal(y, again)


def test_quantized_layer_approximates_the_float_layer(generator):
    x, weight = (
        torch.randn(64, 1152, generator=generator),
        torch.randn(96, 1152, generator=generator),
    )
    q, scale = k.quantize_per_token(x)
    w = k.quantize_weight_w8(weight)
    y = k.gemm_w8a8(q, w.qweight, scale, w.scale)
    # uniform error of half a step: absmax ~ 3.5 sigma, so 3.5 / 127 / sqrt(12) = 0.8 % each side
    assert (y - x @ weight.t()).norm() / (x @ weight.t()).norm() < 0.02


@pytest.mark.parity("P7")
# one, odd, off-tile in each of T, N and K
@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features"),
    [(1, 32, 64), (33, 40, 100), (70, 33, 192), (5, 1, 17)],
)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_kernel_equals_reference(
    num_tokens, out_features, in_features, out_dtype, device, generator
):
    arguments = problem(num_tokens, out_features, in_features, generator)
    y = kernel.launch(*to(device, arguments), out_dtype)
    assert torch.equal(y.cpu(), reference.gemm_w8a8(*arguments, out_dtype))


@pytest.mark.parity("P7")
@pytest.mark.parametrize("per_token_scale", [False, True])
@pytest.mark.parametrize("zero_point", ["none", "one", "per_token"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_epilogue(per_token_scale, zero_point, with_bias, device, generator):
    arguments = problem(37, 45, 64, generator, asymmetric=zero_point != "none")
    if not per_token_scale:
        arguments[2] = arguments[2][:1].contiguous()
    if zero_point == "one":
        arguments[5] = arguments[5][:1].contiguous()
    if not with_bias:
        arguments[4] = None
    y = kernel.launch(*to(device, arguments), torch.float32)
    assert torch.equal(y.cpu(), reference.gemm_w8a8(*arguments, torch.float32))


@pytest.mark.usefixtures("poisoned")
def test_kernel_at_the_extremes_of_int8(device):
    lowest = torch.full((3, 256), -128, dtype=torch.int8)
    highest = torch.full((5, 256), 127, dtype=torch.int8)
    for q in (lowest[:1].expand(3, 256).contiguous(), highest[:3].contiguous()):
        for weight in (lowest, highest):
            zero_point = torch.tensor([-int(q[0, 0]) - 1], dtype=torch.int32)
            arguments = [q, weight, torch.ones(3), torch.ones(len(weight)), None, zero_point]
            arguments.append(weight.sum(dim=1, dtype=torch.int32))
            y = kernel.launch(*to(device, arguments), torch.float32)
            np.testing.assert_array_equal(
                y.cpu().numpy(), direct_sums(q, weight, zero_point).astype(np.float32)
            )


@pytest.mark.usefixtures("poisoned")
def test_kernel_takes_strided_rows(device, generator):
    arguments = problem(20, 24, 64, generator)
    wide_q, wide_w = int8((20, 100), generator), int8((24, 80), generator)
    wide_q[:, 16:80], wide_w[:, :64] = arguments[0], arguments[1]
    expected = reference.gemm_w8a8(*arguments, torch.float32)
    arguments[:2] = wide_q[:, 16:80], wide_w[:, :64]
    assert torch.equal(kernel.launch(*to(device, arguments), torch.float32).cpu(), expected)


@pytest.mark.parametrize(
    "tile", [(16, 64, 32, 4, 2), (64, 16, 64, 4, 3), (32, 32, 128, 4, 2), (128, 64, 32, 8, 2)]
)
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_tile(tile, device, generator):
    arguments = problem(130, 70, 96, generator)
    y = kernel.launch(*to(device, arguments), torch.float32, config=TileConfig(*tile))
    assert torch.equal(y.cpu(), reference.gemm_w8a8(*arguments, torch.float32))


def test_program_order_covers_every_tile(device, generator):
    """More token tiles than GROUP_T, a partial last group, several output tiles."""
    arguments = problem(16 * 11, 3 * 16, 32, generator, asymmetric=False)
    y = kernel.launch(*to(device, arguments), torch.float32, config=TileConfig(16, 16, 32, 4, 2))
    assert torch.equal(y.cpu(), reference.gemm_w8a8(*arguments, torch.float32))


def test_no_tokens(device, generator):
    arguments = problem(0, 8, 64, generator)
    assert kernel.launch(*to(device, arguments), torch.float32).shape == (0, 8)


DIT_XL = [
    (512, 3456, 1152),
    (512, 1152, 1152),
    (8192, 4608, 1152),
    (8192, 1152, 4608),
    (2, 4608, 1152),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "out_features", "in_features"), [*DIT_XL, (1000, 1000, 1000)]
)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_op_on_gpu_equals_reference(num_tokens, out_features, in_features, out_dtype, generator):
    arguments = to("cuda", problem(num_tokens, out_features, in_features, generator))
    *positional, zero_point, weight_sum = arguments
    y = k.gemm_w8a8(*positional, zero_point=zero_point, weight_sum=weight_sum, out_dtype=out_dtype)
    assert torch.equal(y, reference.gemm_w8a8(*arguments, out_dtype))


@pytest.fixture
def fp32_precision():
    """Sets how oneDNN multiplies fp32; puts it back at the end."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    yield lambda setting: setattr(backend, "fp32_precision", setting)
    backend.fp32_precision = before


@pytest.mark.parametrize("setting", ["none", "bf16"])
@pytest.mark.parametrize("in_features", [1024, 1025, 4608])
def test_integer_sums_are_exact_at_the_extremes_whatever_the_fp32_precision(
    setting, in_features, fp32_precision
):
    fp32_precision(setting)
    generator = torch.Generator().manual_seed(in_features)
    q = torch.randint(-128, 128, (3, in_features), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (5, in_features), dtype=torch.int8, generator=generator)
    q[0], weight[0] = -128, -127  # the largest partial sums there are
    exact = q.long() @ weight.long().t()
    assert torch.equal(reference.integer_matmul(q, weight).long(), exact)
