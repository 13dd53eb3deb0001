"""First factor of a low-rank branch: fp64 oracle, the kernel against the reference."""

import re

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import lora_down as kernel
from ditq_kernels.launch.tuning import TileConfig
from ditq_kernels.reference import linear as reference


def problem(num_tokens, rank, in_features, generator, zero="per_token", exact=False):
    """q, down, scale, zero_point. Exact: every sum is an integer below 2**24 whose bf16 rounding is one step."""
    q = torch.randint(-128, 128, (num_tokens, in_features), generator=generator, dtype=torch.int8)
    down = torch.randn(rank, in_features, generator=generator)
    down = (down * 4).round() if exact else down / 30
    scale = torch.ones(num_tokens) if exact else torch.rand(num_tokens, generator=generator) / 100
    zero_point = torch.randint(-128, 128, (num_tokens,), generator=generator, dtype=torch.int32)
    if zero == "one":
        scale, zero_point = scale[:1].contiguous(), zero_point[:1].contiguous()
    return [q, down.bfloat16(), scale, None if zero == "none" else zero_point]


@pytest.mark.parametrize("zero", ["none", "one", "per_token"])
def test_equals_fp64(zero, generator):
    q, down, scale, zero_point = problem(7, 5, 96, generator, zero)
    y = k.lora_down(q, down, scale, zero_point=zero_point)
    centred = q.double() if zero_point is None else q.double() - zero_point.double()[:, None]
    exact = (centred @ down.double().t()) * scale.double()[:, None]
    magnitude = (centred.abs() @ down.double().abs().t()) * scale.double()[:, None]
    # products of 8-bit integers and bf16 are exact in fp32: 96 sums and one scale round by 2**-24, bf16 by 2**-8
    assert y.dtype == torch.bfloat16
    assert (
        (y.double() - exact).abs() <= 97 * 2.0**-24 * magnitude + 2.0**-8 * exact.abs() * 1.001
    ).all()


@pytest.mark.parametrize("zero", ["none", "one", "per_token"])
@pytest.mark.parametrize(
    ("num_tokens", "rank", "in_features"), [(1, 1, 17), (33, 40, 100), (70, 32, 192)]
)
@pytest.mark.usefixtures("poisoned")
def test_kernel_equals_reference(zero, num_tokens, rank, in_features, device, generator):
    arguments = problem(num_tokens, rank, in_features, generator, zero, exact=True)
    moved = [None if value is None else value.to(device) for value in arguments]
    assert torch.equal(kernel.launch(*moved).cpu(), reference.lora_down(*arguments))


@pytest.mark.parametrize("tile", [(16, 16, 32, 4, 2), (64, 64, 128, 4, 2)])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_tile_takes_strided_rows(tile, device, generator):
    q, down, *scales = problem(50, 20, 80, generator, exact=True)
    wide_q, wide_down = torch.zeros(50, 99, dtype=torch.int8), torch.zeros(20, 90).bfloat16()
    wide_q[:, 16:96], wide_down[:, :80] = q, down
    moved = [v.to(device) for v in (wide_q[:, 16:96], wide_down[:, :80], *scales)]
    y = kernel.launch(*moved, config=TileConfig(*tile))
    assert torch.equal(y.cpu(), reference.lora_down(q, down, *scales))


def test_no_tokens(device):
    q, down = torch.zeros(0, 32, dtype=torch.int8), torch.zeros(4, 32).bfloat16()
    y = kernel.launch(q.to(device), down.to(device), torch.ones(1).to(device), None)
    assert y.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"down": torch.zeros(4, 32)}, "down must be [R, K] bfloat16, got [4, 32] float32"),
        ({"down": torch.zeros(4, 16).bfloat16()}, "must share K, got K=32 and K=16"),
        ({"scale": torch.ones(3)}, "scale must be [2] or [1] float32, got [3] float32"),
        ({"zero_point": torch.zeros(2)}, "zero_point must be [2] or [1] int32, got [2] float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, sentence):
    arguments = {
        "q": torch.zeros(2, 32, dtype=torch.int8),
        "down": torch.zeros(4, 32).bfloat16(),
        "scale": torch.ones(1),
    }
    with pytest.raises(ValueError, match=f"^lora_down: .*{re.escape(sentence)}"):
        k.lora_down(**arguments | change)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "in_features"), [(512, 1152), (8192, 4608), (999, 1000)])
def test_op_on_gpu_equals_reference(num_tokens, in_features, generator):
    arguments = problem(num_tokens, 32, in_features, generator, exact=True)
    y = kernel.launch(*(value.cuda() for value in arguments))
    assert torch.equal(y.cpu(), reference.lora_down(*arguments))
