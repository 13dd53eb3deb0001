"""QuantLinear in w4g: the bytes of the file, by numpy one fp32 step at a time, give the layer's output bit for bit."""

import itertools

import numpy as np
import pytest
import torch

from ditq_runtime import LayerFormat, QuantLinear
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.layers.carrier import here
from ditq_runtime.layers.site import Site

K, N, GROUP = 96, 40, 32
FORMATS = [
    LayerFormat("w4g", activations, GROUP, bias)
    for activations, bias in itertools.product(("token", "static"), (False, True))
]


def layer_of(layer_format, dtype=torch.float32, bias=(N,), smooth=False):
    """A layer that reads a site of its own, and its stored tensors as numpy."""
    rng = np.random.default_rng(0)
    groups = K // layer_format.group_size
    codes = rng.integers(0, 16, (N, K))
    zero = rng.integers(0, 16, (N, groups))
    steps = codes.reshape(N, groups, -1) - zero[..., None]
    stored = {
        "weight": (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8),
        "weight_scale": rng.uniform(1e-3, 2e-3, (N, groups)).astype(np.float32),
        "weight_zero": zero.astype(np.uint8),
        "weight_sum": steps.sum(2).astype(np.int32),
        "act_scale": np.array([0.031], np.float32),
        "act_zero": np.array([-37], np.int32),
        "smooth_inv": rng.uniform(0.05, 2.0, K).astype(np.float32),
        "bias": rng.normal(size=bias).astype(np.float32),
        "lora_down": rng.normal(size=(4, K)).astype(np.float32) / 8,
        "lora_up": rng.normal(size=(N, 4)).astype(np.float32) / 8,
    }
    layer, modules = QuantLinear(K, N, layer_format, dtype, "cpu"), []
    if layer_format.integer_gemm:
        site_format = SiteFormat(("linear",), layer_format.activations, smooth=smooth)
        modules.append(Site(K, site_format, "cpu"))
        layer.read(modules[0])
    for module in (layer, *modules):
        for name, parameter in module.named_parameters():
            parameter.data.copy_(torch.from_numpy(stored[name]))
    return layer, steps, stored


def rows(dtype=torch.float32):
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(2))
    x[:, 5] *= 60  # an outlier channel; it leaves the static range
    x[0] = 0
    return x.to(dtype)


def codes_of(x, layer_format, stored, smooth=False):
    """Activation codes minus zero point, [T, K] int64, and their steps [T] fp32."""
    x = x.float().numpy()
    if smooth:
        x = x * stored["smooth_inv"]
    zero, (low, high) = 0, (-127, 127)
    if layer_format.activations == "token":
        step = np.maximum(np.abs(x).max(1) / np.float32(127), np.float32(2.0**-40))
    else:
        step, zero = np.repeat(stored["act_scale"], len(x)), stored["act_zero"][0]
        low, high = -128 - zero, 127 - zero
    return np.clip(np.rint(x * (np.float32(1) / step)[:, None]), low, high).astype(np.int64), step


def integer_product(codes, step, steps, stored):
    y = np.zeros((len(codes), N), np.float32)
    for j in range(steps.shape[1]):
        total = codes.reshape(len(codes), steps.shape[1], -1)[:, j] @ steps[:, j].T
        y = y + total.astype(np.float32) * stored["weight_scale"][:, j]
    return y * step[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("layer_format", FORMATS, ids=lambda f: f.name)
def test_an_integer_layer_equals_numpy(layer_format, dtype, smooth):
    layer, steps, stored = layer_of(layer_format, dtype, smooth=smooth)
    x = rows(dtype)
    y = integer_product(*codes_of(x, layer_format, stored, smooth), steps, stored)
    y = y + stored["bias"] if layer_format.bias else y
    assert torch.equal(layer(x), torch.from_numpy(y).to(dtype))


@pytest.mark.parametrize("activations", ["token", "static"])
def test_a_low_rank_branch_and_a_bias_come_after_the_scales(activations):
    layer_format = LayerFormat("w4g", activations, GROUP, lora_rank=4)
    layer, steps, stored = layer_of(layer_format)
    codes, step = codes_of(rows(), layer_format, stored)
    y = integer_product(codes, step, steps, stored).astype(np.float64)
    down, up = (layer.lora_down.double().numpy(), layer.lora_up.double().numpy())
    x = codes * step.astype(np.float64)[:, None]
    branch = x @ down.T @ up.T
    truth = y + branch + stored["bias"]
    # fp32 sums of K and of 4 terms err by at most their number of roundings of the sums of magnitudes; between the
    # factors lies one rounding to bf16 (8 bits), 2**-8
    magnitude = np.abs(y) + np.abs(x) @ np.abs(down.T) @ np.abs(up.T) + np.abs(stored["bias"])
    bound = 2.0**-24 * (K + 8) * magnitude + 2.0**-8 * 1.001 * np.abs(x @ down.T) @ np.abs(up.T)
    assert (np.abs(layer(rows()).double().numpy() - truth) <= bound).all()
    assert np.abs(branch).max() > 0.1


@pytest.mark.parametrize("activations", ["token", "static"])
@pytest.mark.parametrize(
    "index", [[2], [1, 0, 2, 2, 1, 0, 0]]
)  # all rows one sample, or each its own
def test_each_sample_gets_the_bias_of_its_timestep_group(activations, index):
    layer_format = LayerFormat("w4g", activations, GROUP, groups=3)
    layer, steps, stored = layer_of(layer_format, bias=(3, N))
    y = integer_product(*codes_of(rows(), layer_format, stored), steps, stored)
    here().index = None  # tests that call parts of models alone leave theirs
    with pytest.raises(ValueError, match="ran outside of a forward of its model"):
        layer(rows())
    here().index = torch.tensor(index)
    made = layer(rows())
    here().index = None
    assert torch.equal(made, torch.from_numpy(y + stored["bias"][index]))


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_only_layer_equals_fp64(bias):
    layer, steps, stored = layer_of(LayerFormat("w4g", "none", GROUP, bias=bias))
    weight = (steps * stored["weight_scale"].astype(np.float64)[..., None]).reshape(N, K)
    x, added = rows().double().numpy(), stored["bias"] if bias else np.zeros(N)
    # a rounding of each weight, and a sum of K fp32 products errs by at most K roundings of the magnitudes
    bound = 2.0**-24 * (K + 4) * (np.abs(x) @ np.abs(weight).T + np.abs(added))
    assert (np.abs(layer(rows()).double().numpy() - (x @ weight.T + added)) <= bound).all()


def test_the_dequantized_weight_is_one_rounding_away():
    layer, steps, stored = layer_of(FORMATS[0])
    weight = steps.astype(np.float32) * stored["weight_scale"][..., None]
    assert torch.equal(layer.dequantized_weight(), torch.from_numpy(weight.reshape(N, K)))


def test_all_inputs_in_one_group():
    layer_format = LayerFormat("w4g", "static", K)
    layer, steps, stored = layer_of(layer_format)
    y = integer_product(*codes_of(rows(), layer_format, stored), steps, stored) + stored["bias"]
    assert torch.equal(layer(rows()), torch.from_numpy(y))


def test_casts_of_the_model_change_no_tensor():
    layer = layer_of(FORMATS[0])[0]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    assert layer.compute_dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
