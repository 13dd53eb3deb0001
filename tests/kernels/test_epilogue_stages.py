"""Stages of the GEMM epilogue: biases per timestep group and low-rank branches, in every GEMM."""

import re

import numpy as np
import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import gemm_w4a8, gemm_w4a8_per_group, gemm_w8a8
from ditq_kernels.launch.tuning import TileConfig
from ditq_kernels.reference import linear as reference

MODULES = {
    "gemm_w8a8": gemm_w8a8,
    "gemm_w4a8": gemm_w4a8,
    "gemm_w4a8_per_group": gemm_w4a8_per_group,
}
GEMMS = tuple(MODULES)
GROUPS = 3


def problem(
    op, num_tokens, out_features, in_features, generator, samples=None, rank=None, exact=False
):
    """Positional arguments of reference and launch; the stages by name. Exact: sums are integers below 2**24."""
    q = torch.randint(-128, 128, (num_tokens, in_features), generator=generator, dtype=torch.int8)
    quantize = k.quantize_weight_w4g if op == "gemm_w4a8_per_group" else k.quantize_weight_w4p
    w = quantize(torch.randn(out_features, in_features, generator=generator), 32)
    scale = torch.rand(num_tokens, generator=generator) / 100
    weight_scale = w.scale
    if exact:
        scale, weight_scale = torch.ones(num_tokens), torch.ones_like(weight_scale)
    zero_point = torch.randint(-128, 128, (num_tokens,), generator=generator, dtype=torch.int32)
    shape = (out_features,) if samples is None else (GROUPS, out_features)
    bias = torch.randn(shape, generator=generator)
    weight = [w.expand(), scale, weight_scale]
    if op == "gemm_w4a8":
        weight = [w.packed, scale, w.group_scale, w.group_offset, weight_scale]
    if op == "gemm_w4a8_per_group":
        weight = [w.packed, scale, weight_scale, w.weight_zero]
    stages = {}
    if samples is not None:
        stages["bias_index"] = torch.randint(GROUPS, (samples,), generator=generator)
    if rank is not None:
        for name, rows in (("lora_x", num_tokens), ("lora_up", out_features)):
            factor = torch.randn(rows, rank, generator=generator)
            stages[name] = (factor * 4).round().bfloat16() if exact else factor.bfloat16()
    return [q, *weight, bias, zero_point, w.weight_sum(), torch.float32], stages


def launch(op, device, arguments, stages, **options):
    moved = [value.to(device) if torch.is_tensor(value) else value for value in arguments]
    named = {name: value.to(device) for name, value in stages.items()}
    return MODULES[op].launch(*moved, **named, **options).cpu()


def plain_sums(op, arguments):
    """Dequantized sums before any stage, through the op without them."""
    without_bias = list(arguments)
    without_bias[-4] = None
    return getattr(reference, op)(*without_bias)


@pytest.mark.parametrize("op", GEMMS)
@pytest.mark.parametrize("samples", [1, 2, 6])
def test_each_sample_gets_the_bias_of_its_group(op, samples, generator):
    arguments, stages = problem(op, 6, 5, 64, generator, samples)
    bias = arguments[-4].numpy()
    groups = [stages["bias_index"][t // (6 // samples)].item() for t in range(6)]
    expected = plain_sums(op, arguments).numpy() + np.stack([bias[g] for g in groups])
    got = getattr(reference, op)(*arguments, **stages)
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("op", GEMMS)
# tiles inside a sample, across samples, one row a sample, one sample, off-tile
@pytest.mark.parametrize(("num_tokens", "samples"), [(64, 2), (70, 5), (9, 9), (40, 1), (1, 1)])
@pytest.mark.usefixtures("poisoned")
def test_kernels_with_a_bias_per_group_equal_the_reference(
    op, num_tokens, samples, device, generator
):
    arguments, stages = problem(op, num_tokens, 37, 96, generator, samples)
    expected = getattr(reference, op)(*arguments, **stages)
    assert torch.equal(launch(op, device, arguments, stages), expected)


@pytest.mark.parametrize("op", GEMMS)
@pytest.mark.parametrize("rank", [1, 16, 33, 100])
@pytest.mark.usefixtures("poisoned")
def test_kernels_with_an_exact_low_rank_branch_equal_the_reference(op, rank, device, generator):
    """Integers in every factor: no order of summation rounds, so one wrong element shows."""
    arguments, stages = problem(op, 70, 37, 96, generator, 2, rank, exact=True)
    expected = getattr(reference, op)(*arguments, **stages)
    assert torch.equal(launch(op, device, arguments, stages), expected)


@pytest.mark.parametrize("op", GEMMS)
def test_a_low_rank_branch_comes_between_scales_and_bias(op, generator):
    """By hand in numpy: integers, then one rounding for the bias."""
    arguments, stages = problem(op, 6, 5, 64, generator, rank=7, exact=True)
    x, up = (stages[name].double().numpy() for name in ("lora_x", "lora_up"))
    expected = plain_sums(op, arguments).double().numpy() + x @ up.T
    expected = expected.astype(np.float32) + arguments[-4].numpy()
    got = getattr(reference, op)(*arguments, **stages)
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("op", GEMMS)
@pytest.mark.usefixtures("poisoned")
def test_a_low_rank_branch_is_within_its_roundings(op, device, generator):
    rank = 40
    arguments, stages = problem(op, 33, 45, 64, generator, rank=rank)
    x, up = (stages[name].double() for name in ("lora_x", "lora_up"))
    start, bias = plain_sums(op, arguments).double(), arguments[-4].double()
    exact = start + x @ up.t() + bias
    # a product of two bf16 is exact in fp32; each of at most rank + 2 sums rounds by 2**-24 of what came before
    magnitude = start.abs() + x.abs() @ up.abs().t() + bias.abs()
    for got in (
        launch(op, device, arguments, stages),
        getattr(reference, op)(*arguments, **stages),
    ):
        assert ((got - exact).abs() <= (rank + 2) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("op", GEMMS)
@pytest.mark.parametrize(("tile", "parts"), [((16, 64, 64, 4, 2), 4), ((64, 16, 64, 4, 2), 1)])
@pytest.mark.usefixtures("poisoned")
def test_kernels_of_every_tile(op, tile, parts, device, generator):
    arguments, stages = problem(op, 128, 70, 128, generator, 2, 32, exact=True)
    y = launch(op, device, arguments, stages, config=TileConfig(*tile, parts=parts))
    assert torch.equal(y, getattr(reference, op)(*arguments, **stages))


@pytest.mark.parametrize("op", GEMMS)
def test_public_ops_take_the_stages(op, generator):
    arguments, stages = problem(op, 6, 5, 64, generator, 3, 4)
    *positional, zero_point, weight_sum, _ = arguments
    zero = {"zero_point": zero_point, "weight_sum": weight_sum}
    y = getattr(k, op)(*positional, **zero, **stages, out_dtype=torch.bfloat16)
    assert torch.equal(y, getattr(reference, op)(*arguments, **stages).bfloat16())


REFUSALS = [
    ({"bias_index": torch.zeros(4, dtype=torch.int64)}, "samples equally many of the T=6 rows"),
    ({"bias_index": torch.zeros(2, dtype=torch.int32)}, "bias_index must be [2] int64, got"),
    ({"bias": torch.zeros(5)}, "with bias_index, bias must be [G, 5] float32, got [5]"),
    ({"bias": None}, "with bias_index, bias must be [G, 5] float32, got none"),
    ({"bias_index": None}, "bias must be [5] float32, got [3, 5] float32"),
    ({"lora_x": None}, "lora_x is missing"),
    ({"lora_up": None}, "lora_up is missing"),
    ({"lora_x": torch.zeros(6, 3).bfloat16()}, "lora_x must be [6, 4], got [6, 3]"),
    ({"lora_up": torch.zeros(4, 4).bfloat16()}, "lora_up must be [5, 4], got [4, 4]"),
    ({"lora_up": torch.zeros(5, 4)}, "lora_up must be [5, R] bfloat16, got [5, 4] float32"),
]


@pytest.mark.parametrize("op", GEMMS)
@pytest.mark.parametrize(("change", "sentence"), REFUSALS)
def test_stages_that_do_not_fit_are_refused(op, change, sentence, generator):
    (*weight, bias, _, _, _), stages = problem(op, 6, 5, 64, generator, 3, 4)
    named = {"bias": bias, **stages} | change
    with pytest.raises(ValueError, match=f"^{op}: .*{re.escape(sentence)}"):
        getattr(k, op)(*weight, **named)


@pytest.mark.gpu
@pytest.mark.parametrize("op", GEMMS)
@pytest.mark.parametrize(("num_tokens", "samples"), [(512, 2), (1024, 4), (999, 3)])
def test_ops_on_gpu_equal_the_reference(op, num_tokens, samples, generator):
    arguments, stages = problem(op, num_tokens, 1152, 1152, generator, samples, 32, exact=True)
    y = launch(op, torch.device("cuda"), arguments, stages)
    assert torch.equal(y, getattr(reference, op)(*arguments, **stages))
