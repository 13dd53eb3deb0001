"""Kernels of the weight-only linears: exact where sums are, within the roundings of fp32 elsewhere."""

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import linear_w4, linear_w8
from ditq_kernels.launch.tuning import TileConfig

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(op, batch, out_features, in_features, generator, group_size=32):
    """x, weights as positional arguments, bias, expanded weights and their scale."""
    w = k.quantize_weight_w4p(
        torch.randn(out_features, in_features, generator=generator), group_size
    )
    parts = (
        (w.expand(), w.scale)
        if op == "linear_w8"
        else (w.packed, w.group_scale, w.group_offset, w.scale)
    )
    bias = torch.randn(out_features, generator=generator)
    return torch.randn(batch, in_features, generator=generator), parts, bias, w


def launch(op, device, x, parts, bias, out_dtype=torch.float32, config=None):
    module = {"linear_w8": linear_w8, "linear_w4": linear_w4}[op]
    moved = [v.to(device) for v in (x, *parts)]
    moved.append(None if bias is None else bias.to(device))
    return module.launch(*moved, out_dtype, config).cpu()


def assert_right(y, x, w, bias):
    exact = (x.double() @ w.expand().double().t()) * w.scale.double()
    magnitude = (x.double().abs() @ w.expand().double().abs().t()) * w.scale.double()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    # up to three exact products an input, each summed with one rounding of fp32; scale and bias round once
    bound = (3 * x.shape[1] + 2) * 2.0**-24 * magnitude
    assert ((y.double() - exact).abs() <= bound).all()


# one, odd, off-tile; groups of one tile, of several and of an odd number of 32
@pytest.mark.parametrize("op", ["linear_w8", "linear_w4"])
@pytest.mark.parametrize(
    ("batch", "out_features", "in_features", "group_size"),
    [(1, 1, 32, 32), (3, 50, 288, 96), (17, 33, 128, 64), (2, 40, 256, 256)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_kernels_have_the_accuracy_of_fp32(
    op, batch, out_features, in_features, group_size, dtype, device, generator
):
    x, parts, bias, w = problem(op, batch, out_features, in_features, generator, group_size)
    x = x.to(dtype)
    for added in (bias, None):
        assert_right(launch(op, device, x, parts, added), x, w, added)


@pytest.mark.parametrize("op", ["linear_w8", "linear_w4"])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_exact_sums_equal_the_reference_bit_for_bit(op, out_dtype, device, generator):
    """Inputs of more bits than one part has, in rows so sparse that no sum rounds."""
    _, parts, bias, _ = problem(op, 9, 37, 96, generator)
    single = torch.zeros(9, 96)
    single[torch.arange(9), torch.randint(96, (9,), generator=generator)] = 1 + 2.0**-11 + 2.0**-16
    y = launch(op, device, single, parts, bias, out_dtype)
    assert torch.equal(y, getattr(k, op)(single, *parts, bias, out_dtype=out_dtype))
    assert not torch.equal(single, single.bfloat16().float())


@pytest.mark.parametrize("op", ["linear_w8", "linear_w4"])
@pytest.mark.parametrize("tile", [(16, 16, 32, 4, 2), (32, 64, 128, 4, 2)])
@pytest.mark.usefixtures("poisoned")
def test_kernels_of_every_tile_take_strided_rows(op, tile, device, generator):
    x, parts, bias, w = problem(op, 20, 70, 128, generator, 128)
    wide = torch.zeros(20, 150)
    wide[:, 7:135] = x
    assert_right(
        launch(op, device, wide[:, 7:135], parts, bias, config=TileConfig(*tile)), x, w, bias
    )


@pytest.mark.parametrize("op", ["linear_w8", "linear_w4"])
def test_no_rows(op, device, generator):
    x, parts, bias, _ = problem(op, 2, 8, 64, generator)
    assert launch(op, device, x[:0], parts, bias).shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["linear_w8", "linear_w4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ops_on_gpu(op, dtype, generator):
    x, parts, bias, w = problem(op, 4, 6912, 1152, generator, 64)
    assert_right(launch(op, torch.device("cuda"), x.to(dtype), parts, bias), x.to(dtype), w, bias)
