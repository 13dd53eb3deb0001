"""QuantLinear against fp64 arithmetic on numbers known before they were packed; its tensors keep their dtype."""

import copy
import itertools

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ditq_runtime import LayerFormat, QuantLinear
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.layers.site import Site

K, N, GROUP = 96, 40, 32
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # roundings

INTEGER = [
    LayerFormat(weights, activations, GROUP if weights == "w4p" else None, bias)
    for weights, activations, bias in itertools.product(
        ("w8", "w4p"), ("token", "static"), (False, True)
    )
]
FLOAT = [
    LayerFormat(weights, "none", GROUP if weights == "w4p" else None, bias=bias)
    for weights, bias in itertools.product(("w8", "w4p", "fp32"), (False, True))
]
STATIC = LayerFormat("w4p", "static", GROUP)


def _name(layer_format):
    parts = [layer_format.weights, layer_format.activations]
    return "-".join(parts + ["bias"] * layer_format.bias)


def _layer(layer_format, compute_dtype=torch.float32, wide_output=False, smooth=True):
    """A layer that reads a site of its own; and as numpy its integer (or real) weights and all tensors."""
    rng = np.random.default_rng(0)
    stored = {
        "weight_scale": rng.uniform(1e-3, 2e-3, N).astype(np.float32),
        "smooth_inv": rng.uniform(0.05, 2.0, K).astype(np.float32),
        "bias": rng.normal(size=N).astype(np.float32),
        "act_scale": np.array([0.031], np.float32),
        "act_zero": np.array([-37], np.int32),
    }
    weight = rng.integers(-127, 128, (N, K))
    stored["weight"] = weight.astype(np.int8)
    if layer_format.weights == "w4p":
        codes = rng.integers(0, 16, (N, K))
        scale = rng.integers(1, 17, (N, K // GROUP))
        offset = rng.integers(-127, 128 - 15 * scale)  # the largest code stays at or below 127
        weight = (codes.reshape(N, -1, GROUP) * scale[..., None] + offset[..., None]).reshape(N, K)
        stored["weight"] = (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)
        stored["group_scale"] = scale.astype(np.uint8)
        stored["group_offset"] = offset.astype(np.int8)
    if layer_format.weights == "fp32":
        weight = stored["weight"] = rng.normal(size=(N, K)).astype(np.float32)
    stored["weight_sum"] = weight.sum(1).astype(np.int32)

    layer, modules = QuantLinear(K, N, layer_format, compute_dtype, "cpu", wide_output), []
    if layer_format.integer_gemm:
        site_format = SiteFormat(("linear",), layer_format.activations, smooth=smooth)
        modules.append(Site(K, site_format, "cpu"))
        layer.read(modules[0])
    for module in (layer, *modules):
        for name, parameter in module.named_parameters():
            parameter.data.copy_(torch.from_numpy(stored[name]))
    return layer, weight, stored


def _input(num_tokens=7, dtype=torch.float32):
    x = torch.randn(num_tokens, K, generator=torch.Generator().manual_seed(2))
    x[:, 5] *= 60  # an outlier channel; it leaves the static range
    x[0] = 0
    return x.to(dtype)


def _codes(x, layer_format, stored, smooth=True):
    """Activation codes minus zero point, and their step a token, in correctly rounded fp32 steps."""
    x = x.float().numpy()
    if smooth:
        x = x * stored["smooth_inv"]
    if layer_format.activations == "token":
        step = np.maximum(np.abs(x).max(1) / np.float32(127), np.float32(2.0**-40))
        low, high = -127, 127
    else:
        step = np.repeat(stored["act_scale"], len(x))
        low, high = -128 - stored["act_zero"][0], 127 - stored["act_zero"][0]
    codes = np.rint(x * (np.float32(1) / step)[:, None])
    return np.clip(codes, low, high).astype(np.int64), step


def _bias(layer_format, stored):
    return stored["bias"].astype(np.float64) if layer_format.bias else np.zeros(N)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("layer_format", INTEGER, ids=_name)
def test_an_integer_layer_equals_fp64(layer_format, dtype, smooth):
    layer, weight, stored = _layer(layer_format, dtype, smooth=smooth)
    x = _input(dtype=dtype)
    codes, step = _codes(x, layer_format, stored, smooth)
    total = codes @ weight.T  # exact
    real_step = step.astype(np.float64)[:, None] * stored["weight_scale"].astype(np.float64)
    product = total * real_step
    y = product + _bias(layer_format, stored)
    # |total| <= 96 * 255 * 127 < 2**24, so it is exact in fp32; then one rounding each of the step, the product and
    # the sum with the bias, 2**-24 of their size, and one of the output
    bound = 2.0**-24 * (2.01 * np.abs(product) + np.abs(y)) + UNIT[dtype] * np.abs(y) * 1.001
    got = layer(x)
    assert got.dtype == dtype
    assert (np.abs(got.double().numpy() - y) <= bound).all()


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("layer_format", FLOAT, ids=_name)
def test_a_float_layer_equals_fp64(layer_format, dtype):
    layer, weight, stored = _layer(layer_format, dtype)
    x = _input(dtype=dtype)
    scale = 1.0 if layer_format.weights == "fp32" else stored["weight_scale"].astype(np.float64)
    weight = weight * np.broadcast_to(scale, N)[:, None]
    y = x.double().numpy() @ weight.T + _bias(layer_format, stored)
    # a sum of K fp32 products errs by at most K roundings of the sum of magnitudes, whatever its order
    magnitude = np.abs(x.double().numpy()) @ np.abs(weight).T + np.abs(_bias(layer_format, stored))
    bound = 2.0**-24 * (K + 3) * magnitude + UNIT[dtype] * np.abs(y) * 1.001
    got = layer(x)
    assert got.dtype == dtype
    assert (np.abs(got.double().numpy() - y) <= bound).all()


@pytest.mark.parametrize("layer_format", [*INTEGER, *FLOAT], ids=_name)
def test_the_dequantized_weight_is_one_rounding_away(layer_format):
    layer, weight, stored = _layer(layer_format)
    if layer_format.weights != "fp32":
        weight = (weight.astype(np.float32)) * stored["weight_scale"][:, None]
    assert torch.equal(layer.dequantized_weight(), torch.from_numpy(weight))


@pytest.mark.parametrize("layer_format", [INTEGER[0], FLOAT[0], LayerFormat("fp32", "none")])
def test_a_wide_output_is_fp32_and_not_rounded_before(layer_format):
    narrow, wide = (_layer(layer_format, torch.bfloat16, wide)[0] for wide in (False, True))
    exact = _layer(layer_format, torch.float32)[0]
    x = _input(dtype=torch.bfloat16)
    assert wide(x).dtype == torch.float32
    assert torch.equal(wide(x), exact(x))
    assert torch.equal(wide(x).bfloat16(), narrow(x))


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("layer_format", [INTEGER[0], STATIC, *FLOAT[-3:]], ids=_name)
def test_leading_dimensions_are_kept(layer_format):
    layer = _layer(layer_format)[0]
    x = _input(12)
    flat = layer(x)
    assert torch.equal(layer(x.view(2, 3, 2, K)), flat.view(2, 3, 2, N))
    assert torch.equal(layer(x[3]), flat[3])
    assert layer(x[:0]).shape == (0, N)


@pytest.mark.parametrize("layer_format", [INTEGER[0], STATIC, *FLOAT[-3:]], ids=_name)
def test_any_layout_of_the_input_is_taken_as_a_linear_takes_it(layer_format):
    layer = _layer(layer_format)[0]
    x = _input(12)
    expected = layer(x)
    assert torch.equal(layer(x.t().contiguous().t()), expected)  # columns contiguous
    wide = torch.cat([x, x], dim=1)
    assert torch.equal(layer(wide[:, :K]), expected)  # a slice of wider rows
    torch.testing.assert_close(layer(x[:1].expand(5, K)), expected[:1].expand(5, N))


def _tensors(module):
    return {name: (t.dtype, t.clone()) for name, t in module.state_dict().items()}


def _assert_unchanged(module, before):
    assert module.state_dict().keys() == before.keys()
    for name, tensor in module.state_dict().items():
        dtype, value = before[name]
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, value), name


CASTS = {
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "half": (lambda m: m.half(), torch.float16),
    "double": (lambda m: m.double(), torch.float64),
    "float": (lambda m: m.bfloat16().float(), torch.float32),
    "fp8": (lambda m: m.to(torch.float8_e4m3fn), torch.float8_e4m3fn),
    "type": (lambda m: m.type(torch.float16), torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("layer_format", [STATIC, INTEGER[0], *FLOAT[-2:]], ids=_name)
def test_casts_change_the_compute_dtype_and_no_tensor(layer_format, cast):
    layer = _layer(layer_format)[0]
    before = _tensors(layer)
    change, dtype = CASTS[cast]
    model = nn.Sequential(layer, nn.Linear(N, 3))
    change(model)
    assert model[1].weight.dtype == dtype  # the cast did something
    assert layer.compute_dtype == dtype
    _assert_unchanged(layer, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_layer_computes_in_the_new_dtype(dtype):
    layer, expected = _layer(STATIC)[0].to(dtype), _layer(STATIC, dtype)[0]
    x = _input(dtype=dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), expected(x))


def test_moving_to_another_device_moves_every_tensor():
    layer = _layer(STATIC)[0].to("meta", torch.bfloat16)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    dtypes = {name: p.dtype for name, p in layer.named_parameters()}
    assert dtypes == {name: dtype for name, (dtype, _) in STATIC.tensors(K, N).items()}


@pytest.mark.parametrize("name", ["w8_static", "w4p_static"])
def test_layerwise_casting_of_a_model_spares_packed_layers(packed_folder, load, forward, name):
    model = load(packed_folder(name), dtype=torch.bfloat16)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    before = {n: _tensors(m) for n, m in packed.items()}
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    output = forward(model, torch.bfloat16)
    assert output.dtype == torch.bfloat16
    assert bool(torch.isfinite(output).all())
    assert model.proj_out_2.weight.dtype == torch.float8_e4m3fn  # other layers are stored in fp8
    for n, layer in packed.items():
        _assert_unchanged(layer, before[n])


@pytest.mark.parametrize("cast", ["bfloat16", "double"])
def test_casts_of_a_whole_model_spare_packed_layers(packed_folder, load, cast):
    model = load(packed_folder("w4p_static"))
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    before = [_tensors(m) for m in packed]
    getattr(model, cast)()
    for layer, tensors in zip(packed, before, strict=True):
        _assert_unchanged(layer, tensors)
        assert layer.compute_dtype == CASTS[cast][1]
    assert isinstance(model, DiTTransformer2DModel)


@pytest.mark.parametrize("layer_format", [STATIC, FLOAT[1]], ids=_name)
def test_a_deep_copy_is_independent_and_equal(layer_format):
    layer = _layer(layer_format, torch.bfloat16, wide_output=True)[0]
    twin = copy.deepcopy(layer)
    x = _input(dtype=torch.bfloat16)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    assert (twin.format, twin.compute_dtype, twin.wide_output) == (
        layer_format,
        torch.bfloat16,
        True,
    )
    twin.weight_scale.data.mul_(2)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(twin(x), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layer_format", [*INTEGER, *FLOAT], ids=_name)
def test_a_state_dict_round_trip(layer_format, assign):
    layer = _layer(layer_format)[0]
    expected = {n: (d, s) for n, (d, s) in layer_format.tensors(K, N).items()}
    state = layer.state_dict()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in state.items()} == expected
    other = QuantLinear(K, N, layer_format, device="cpu")
    other.load_state_dict(state, assign=assign)
    other.read(layer.site)
    assert torch.equal(other(_input()), layer(_input()))


def test_hosts_see_a_linear_that_needs_no_gradient():
    layer = QuantLinear(K, N, STATIC)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.weight.dtype) == (K, N, torch.uint8)
    assert all(p.is_meta and not p.requires_grad for p in layer.parameters())
    assert not [*layer.buffers()]  # accelerate does not offload buffers
    assert QuantLinear(K, N, LayerFormat("w8", "token", bias=False)).bias is None
    text = repr(layer)
    for part in ("in_features=96", "out_features=40", "weights='w4p'", "group_size=32", "'static'"):
        assert part in text
