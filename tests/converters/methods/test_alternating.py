"""Alternating optimization: its guarantees, and no others. The error may rise; a test shows that it does."""

from itertools import pairwise

import pytest
import torch

import ditq_kernels as k
from ditq_converters.methods.alternating import alternate, low_rank

SHAPES = [(48, 64), (64, 48), (33, 33)]


def matrix(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def coarse(levels):
    """Round to nearest on a grid that follows its input: min-max per row, fp64."""

    def quantize(values):
        scale = values.abs().amax(dim=1, keepdim=True) / levels
        return (values / scale).round() * scale

    return quantize


def w8(values):
    return k.quantize_weight_w8(values).dequantize()


def frozen_w8(weight):
    """An int8 quantizer whose row scales are those of `weight`, whatever it is given later."""
    scale = k.symmetric_scale(weight.abs().amax(dim=1))[:, None]
    return lambda values: k.dequantize(k.quantize_symmetric(values, scale), scale)


def w4p(values):
    return k.quantize_weight_w4p(values, 32).dequantize()


class Spy:
    """A quantizer that remembers its calls."""

    def __init__(self, quantize):
        self.quantize, self.inputs, self.outputs = quantize, [], []

    def __call__(self, values):
        self.inputs.append(values)
        self.outputs.append(self.quantize(values))
        return self.outputs[-1]


@pytest.mark.parametrize("shape", SHAPES)
def test_low_rank_is_the_best_approximation(shape):
    """Eckart and Young: the error is the norm of the singular values left out."""
    target = matrix(*shape)
    u, s, vt = torch.linalg.svd(target, full_matrices=False)
    for rank in (1, 5, min(shape)):
        down, up = low_rank(target, rank)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        # singular vectors move by eps * |M|^2 / gap of squared values: below 1e-10 for these
        torch.testing.assert_close(up @ down, best, rtol=0, atol=1e-10)
        root = s[:rank].sqrt()  # half of S on either side
        torch.testing.assert_close(down.norm(dim=1), root, rtol=1e-10, atol=0)
        torch.testing.assert_close(up.norm(dim=0), root, rtol=1e-10, atol=0)


def test_low_rank_of_zero_is_zero():
    down, up = low_rank(torch.zeros(4, 6, dtype=torch.float64), 2)
    assert torch.equal(up @ down, torch.zeros(4, 6, dtype=torch.float64))


@pytest.mark.parity("P10")
@pytest.mark.parametrize("quantize", [coarse(1), coarse(7), w8, w4p])
@pytest.mark.parametrize("rank", [1, 8])
def test_best_is_at_most_the_first_and_that_at_most_rounding(quantize, rank):
    for seed in range(3):
        target = matrix(48, 64, seed)
        result = alternate(target, quantize, rank)
        nearest = (target - quantize(target).double()).norm().item()
        assert len(result.errors) == 10
        assert min(result.errors) <= result.errors[0] < nearest


@pytest.mark.parity("P10")
@pytest.mark.parametrize("quantize", [coarse(1), coarse(7), w8, w4p])
def test_the_kept_iterate_is_the_best_and_can_be_made_again(quantize):
    target = matrix(48, 64)
    result = alternate(target, quantize, rank=8, iterations=20)
    again = quantize(result.quantize_target).double() + result.lora_up @ result.lora_down
    assert (target - again).norm().item() == pytest.approx(min(result.errors), rel=1e-12)
    assert result.lora_down.shape == (8, 64)
    assert result.lora_up.shape == (48, 8)


@pytest.mark.parity("P10")
@pytest.mark.parametrize("quantize", [coarse(1), w8, w4p])
def test_the_low_rank_step_never_raises_the_error(quantize):
    """Every error against the tail of singular values, and against the branch of the step before."""
    target, spy = matrix(48, 64), Spy(quantize)
    result = alternate(target, spy, rank=8)
    for error, before, quantized in zip(result.errors, spy.inputs, spy.outputs, strict=True):
        residual = target - quantized.double()
        tail = torch.linalg.svdvals(residual)[8:].norm().item()
        assert error == pytest.approx(tail, rel=1e-12)
        assert error <= (before - quantized.double()).norm().item() * (1 + 1e-12)


def test_a_moving_grid_can_raise_the_error_and_the_best_is_kept():
    rises = 0
    for seed in range(4):
        target, spy = matrix(48, 64, seed), Spy(coarse(1))
        result = alternate(target, spy, rank=8, iterations=30)
        rises += sum(b > a * (1 + 1e-9) for a, b in pairwise(result.errors))
        best = result.errors.index(min(result.errors))
        assert torch.equal(result.quantize_target, spy.inputs[best])
    assert rises > 0  # otherwise this file tests no keeping


@pytest.mark.parity("P10")
@pytest.mark.parametrize("rank", [2, 8])
def test_with_a_frozen_grid_the_error_never_rises(rank):
    target = matrix(48, 64)
    step = target.abs().amax(dim=1, keepdim=True) / 3

    def fine(values):  # the nearest point of a fixed grid, in fp64
        return (values / step).round().clamp(-3, 3) * step

    errors = alternate(target, fine, rank, iterations=30).errors
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]
    errors = alternate(target, frozen_w8(target), rank, iterations=30).errors
    # codes are chosen in fp32: a tie within 2^-23 |q| <= 2^-16 of a step may fall the wrong way, at a cost of
    # 2 * 2^-16 step^2 beside a mean squared error near step^2 / 12
    assert all(b <= a * (1 + 12 * 2**-16) for a, b in pairwise(errors))
    assert errors[-1] < errors[0]


def test_a_frozen_grid_keeps_its_scales():
    target = torch.tensor([[127.0, 1.0], [2.54, 0.0]], dtype=torch.float64)
    quantize = frozen_w8(target)
    found = quantize(torch.tensor([[3.4, -500.0], [0.03, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[3.0, -127.0], [0.04, 0.0]]))


@pytest.mark.parity("P10")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extra", [0, 7])
def test_a_full_rank_takes_up_the_whole_error(shape, extra):
    target, full = matrix(*shape), min(shape)
    result = alternate(target, coarse(1), rank=full + extra)
    assert result.lora_down.shape == (full, shape[1])
    assert result.lora_up.shape == (shape[0], full)
    assert min(result.errors) < 1e-12 * target.norm().item()


def test_an_exact_quantizer_leaves_nothing_to_the_branch():
    target = matrix(5, 6)
    result = alternate(target, lambda values: values.clone(), rank=2, iterations=3)
    assert result.errors == (0.0, 0.0, 0.0)
    assert torch.equal(result.quantize_target, target)
    assert not (result.lora_up @ result.lora_down).any()


@pytest.mark.parametrize(("rank", "iterations"), [(0, 1), (1, 0), (-1, 5)])
def test_nothing_to_do_is_refused(rank, iterations):
    with pytest.raises(ValueError, match="rank and iterations must be at least 1"):
        alternate(matrix(3, 3), w8, rank, iterations)
