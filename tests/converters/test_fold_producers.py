"""Norms and products absorb what their readers undo: the same function in fp64."""

import pytest
import torch
from torch.nn import functional as F

from ditq_converters.convert.fold import LinearTensors, fold_block, norm_tensors
from ditq_converters.methods import Transform
from ditq_runtime.families import BlockTable, NormWeights, ProductRows, Site

K, N = 6, 4


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SMOOTH, SHIFT = rand(K, seed=0).exp(), rand(1, K, seed=1)
NORM, PRODUCT = NormWeights("made", True), ProductRows("made", 0, K)


def fold(made, producer, transform):
    """Fold in place into what makes the input of one reader."""
    linears = {"made": made, "reader": LinearTensors(torch.ones(1, K).double(), None)}
    fold_block(linears, BlockTable((Site("site", ("reader",), producer),)), {"site": transform})


@pytest.mark.parametrize("shift", [None, SHIFT])
def test_a_norm_makes_the_transformed_input(shift):
    x, weight, bias = rand(5, K, seed=2), rand(K, seed=3), rand(K, seed=4)
    norm = LinearTensors(weight[:, None].clone(), bias[None].clone())
    fold(norm, NORM, Transform(SMOOTH, shift))
    expected = (F.layer_norm(x, (K,), weight, bias) - (0 if shift is None else shift)) / SMOOTH
    got = F.layer_norm(x, (K,), norm.weight[:, 0], norm.bias[0])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_norm_without_a_bias_takes_a_factor_alone():
    x, weight = rand(5, K, seed=2), rand(K, seed=3)
    norm = LinearTensors(weight[:, None].clone(), None)
    fold(norm, NORM, Transform(SMOOTH))
    expected = F.rms_norm(x, (K,), weight) / SMOOTH
    torch.testing.assert_close(F.rms_norm(x, (K,), norm.weight[:, 0]), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="one shift if it has a bias"):
        fold(norm, NORM, Transform(SMOOTH, SHIFT))
    biased = LinearTensors(weight[:, None], weight[None])
    with pytest.raises(ValueError, match="one shift if it has a bias"):
        fold(biased, NORM, Transform(None, rand(2, K, seed=5)))


def test_the_linear_factor_of_a_gated_mlp_makes_the_transformed_input():
    """GEGLU: the first half of the rows is the linear factor, the second the gate."""
    x, weight, bias = rand(5, N, seed=6), rand(2 * K, N, seed=7), rand(2 * K, seed=8)

    def geglu(w, b):
        value, gate = F.linear(x, w, b).chunk(2, -1)
        return value * F.gelu(gate)

    linear = LinearTensors(weight.clone(), bias[None].clone())
    fold(linear, PRODUCT, Transform(SMOOTH))
    expected = geglu(weight, bias) / SMOOTH
    torch.testing.assert_close(geglu(linear.weight, linear.bias[0]), expected, rtol=0, atol=1e-12)
    assert torch.equal(linear.weight[K:], weight[K:])
    with pytest.raises(ValueError, match="takes no shift"):
        fold(linear, PRODUCT, Transform(SMOOTH, SHIFT))


def test_a_norm_is_stored_as_its_model_has_it():
    norm = LinearTensors(rand(K, 1, seed=3), rand(1, K, seed=4))
    stored = norm_tensors(norm, torch.bfloat16)
    assert {name: (t.dtype, t.shape) for name, t in stored.items()} == {
        "weight": (torch.bfloat16, (K,)),
        "bias": (torch.bfloat16, (K,)),
    }
    assert list(norm_tensors(LinearTensors(norm.weight, None), torch.float32)) == ["weight"]
