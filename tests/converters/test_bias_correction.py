"""Bias correction: hand-worked, against fp64 from the codes, and zero mean error on the rows, group by group."""

import numpy as np
import pytest
import torch

from ditq_converters import Recipe, StatisticsError, calibrate, convert
from ditq_converters.convert.bias_correction import CHUNK, SampledRows, corrected_bias
from ditq_converters.convert.fold import LinearTensors
from ditq_converters.convert.quantize import quantize_linear, quantizer_tensors
from ditq_converters.methods import Transform
from ditq_runtime import QuantLinear
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.layers.carrier import here
from ditq_runtime.layers.site import Site

K, N = 64, 24
LIMITS = torch.tensor(-6.0), torch.tensor(9.0)


def linear_of(groups=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator, dtype=torch.float64)
    return LinearTensors(weight, torch.randn(groups, N, generator=generator, dtype=torch.float64))


def rows_of(count, seed=1):
    """Rows with a large constant part, as channels with offsets have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, K, generator=generator, dtype=torch.float64)
    return x + 3 * torch.rand(K, generator=generator, dtype=torch.float64)


def one_group(x):
    return SampledRows(x, torch.zeros(len(x), dtype=torch.int64))


def test_a_constant_input_by_hand():
    """Weights (127, 0.4) become the codes (127, 0): every row with 10 in the second channel loses 4.

    The second output, (0.4, 127), loses 0.4 times the first channel, whose mean is 0.
    """
    weight = torch.tensor([[127.0, 0.4], [0.4, 127.0]], dtype=torch.float64)
    linear = LinearTensors(weight, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    layer_format = LayerFormat("w8", "static")
    limits = torch.tensor(-12.8), torch.tensor(12.7)  # steps of 0.1: the rows are exact
    stored, quantizer = quantize_linear(linear, layer_format), quantizer_tensors(limits, None)
    assert stored["weight"].tolist() == [[127, 0], [0, 127]]
    rows = one_group(torch.tensor([[1.0, 10.0], [-1.0, 10.0]], dtype=torch.float64))
    found = corrected_bias(linear, layer_format, stored, quantizer, rows)
    assert found.dtype == torch.float32
    # a product of 1270 in fp32, 0.1 is none of its numbers: 1270 * 2^-22
    torch.testing.assert_close(found, torch.tensor([5.0, 1.0]), rtol=0, atol=4e-4)


@pytest.mark.parametrize("activations", ["token", "static"])
def test_it_is_the_mean_error_of_the_definition(activations):
    """X W^T - Xq Wq^T in fp64 from the codes, with quantizers written out."""
    linear, x = linear_of(), rows_of(90)
    layer_format = LayerFormat("w8", activations)
    stored = quantize_linear(linear, layer_format)
    quantizer = quantizer_tensors(LIMITS if activations == "static" else None, None)
    rows = x.numpy().astype(np.float32)
    if activations == "token":
        scale = np.abs(rows).max(1, keepdims=True) / np.float32(127)
        rounded = np.rint(rows / scale) * scale.astype(np.float64)
    else:
        scale = np.float32(15) / np.float32(255)
        zero = np.rint(-128 + 6 / scale)
        codes = np.clip(np.rint(rows / scale) + zero, -128, 127)
        rounded = (codes - zero) * np.float64(scale)
    weight = stored["weight"].double() * stored["weight_scale"].double()[:, None]
    error = x.numpy() @ linear.weight.numpy().T - rounded @ weight.numpy().T
    expected = linear.bias[0] + torch.from_numpy(error.mean(0))
    found = corrected_bias(linear, layer_format, stored, quantizer, one_group(x))
    # sums of outputs below 100 in fp32: 100 * 2^-24 each; a code on the other side of a tie moves a mean by
    # scale * weight / 90 < 0.1 * 4 / 90
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-3)
    assert float((found.double() - linear.bias[0]).abs().max()) > 0.02


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("activations", ["token", "static"])
@pytest.mark.parametrize("weights", ["w8", "w4p", "w4g"])
def test_the_mean_output_of_the_layer_is_that_of_the_float_one(weights, activations, rank, smooth):
    linear, x = linear_of(), rows_of(CHUNK + 7)
    group = None if weights == "w8" else 32
    layer_format = LayerFormat(weights, activations, group, lora_rank=rank)
    smooth_inv = torch.linspace(0.3, 2, K, dtype=torch.float64) if smooth else None
    stored = quantize_linear(linear, layer_format)
    quantizer = quantizer_tensors(
        LIMITS if activations == "static" else None,
        Transform(1 / smooth_inv) if smooth else None,
    )
    site = Site(K, SiteFormat(("linear",), activations, smooth=smooth))
    site.load_state_dict(quantizer, assign=True)
    corrected = corrected_bias(linear, layer_format, stored, quantizer, one_group(x))
    raw = (x / smooth_inv if smooth else x).float()
    truth = (x @ linear.weight.T + linear.bias).mean(0)
    errors = []
    for bias in (stored["bias"], corrected):
        layer = QuantLinear(K, N, layer_format)
        layer.read(site)
        layer.load_state_dict({**stored, "bias": bias}, assign=True)
        errors.append(float((layer(raw).double().mean(0) - truth).abs().max()))
    # outputs below 100, in fp32 to a few units of 2^-24 each
    assert errors[1] < 100 * 2**-22
    assert errors[0] > 100 * errors[1]


def test_every_group_by_its_own_rows_and_one_without_rows_by_all():
    """Tables run by rising timestep, calls by falling: rows of group 0 are those of the last bias."""
    linear, x = linear_of(groups=3), rows_of(60)
    x[:20] += 1
    group = torch.tensor([0] * 20 + [2] * 40)
    layer_format = LayerFormat("w4p", "token", 32, groups=3)
    stored = quantize_linear(linear, layer_format)
    found = corrected_bias(linear, layer_format, stored, {}, SampledRows(x, group))
    assert found.shape == (3, N)
    alone = LayerFormat("w4p", "token", 32)
    for row, chosen in ((2, group == 0), (1, group >= 0), (0, group == 2)):
        single = LinearTensors(linear.weight, linear.bias[row : row + 1])
        packed = quantize_linear(single, alone)
        expected = corrected_bias(single, alone, packed, {}, one_group(x[chosen]))
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)
    assert float((found[0] - linear.bias[0] - found[2] + linear.bias[2]).abs().max()) > 0.01


@pytest.fixture(scope="module")
def model(make_dit):
    return make_dit(4, num_attention_heads=2, attention_head_dim=32)


@pytest.fixture(scope="module")
def stats(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("correction") / "stats"
    return calibrate(model, out, steps=20, samples=2, rows=16, quiet=True)


def folded(packed, block, site, rows, group):
    """The rows as the site's linears get them, by the folds that the checkpoint keeps."""
    tensors, prefix = packed.state_dict(), f"{block}.ditq_sites.{site}"
    shift = tensors[f"{prefix}.fold_shift"].double()
    shift = shift[group] if len(shift) > 1 else shift[0]
    return (rows - shift) / tensors[f"{prefix}.scale"].double()


@pytest.mark.parametrize("activations", ["token", "static"])
def test_a_converted_table_leaves_no_mean_error_in_any_group(model, stats, activations):
    """The oracle is the float model's own linear on the recorded rows, before any fold."""
    recipe = Recipe("htg", "w4p", activations, 32, num_groups=3, bias_correction=True)
    packed = convert(model, recipe, stats, quiet=True)
    kept = packed.config.quantization_config.recipe["plan"]["linears"]
    assert kept["transformer_blocks.*.ff.net.2"]["bias_correction"] is True
    block = "transformer_blocks.1"
    bounds = packed.state_dict()[f"{block}.timestep_groups.bounds"]
    for site, name in (
        ("qkv", "attn1.to_q"), ("o_proj", "attn1.to_out.0"), ("fc1", "ff.net.0.proj"), ("fc2", "ff.net.2"),
    ):  # fmt: skip
        layer = packed.get_submodule(f"{block}.{name}")
        rows, calls = stats.rows(f"{block}.{site}")
        timesteps = torch.tensor([stats.timesteps[call] for call in calls], dtype=torch.float32)
        groups = torch.bucketize(timesteps, bounds)
        truth = model.get_submodule(f"{block}.{name}")(rows).double()
        tables = layer.format.groups
        assert tables == (3 if site in ("qkv", "fc1") else 1)
        for group in range(tables):
            chosen = groups == group if tables > 1 else torch.ones_like(groups, dtype=torch.bool)
            x = rows[chosen].double()
            if site != "fc2":
                x = folded(packed, block, site, x, group)
            if tables > 1:
                here().index = torch.tensor([group])
            error = layer(x.float().flatten(0, 1)[None]).double().mean((0, 1))
            here().index = None
            error -= truth[chosen].mean((0, 1))
            assert float(error.abs().max()) < 1e-5, (name, group)


def test_biases_of_the_sites_change_and_nothing_else(make_dit, stats, tmp_path):
    """Of linears that read a site or a modulation's input; a linear without a bias gets none."""
    model = make_dit(3, attention_bias=False)  # q, k and v without a bias keep none
    stats = calibrate(model, tmp_path / "stats", steps=3, samples=1, rows=8, quiet=True)
    plain, corrected = (
        convert(
            model,
            Recipe("smoothquant", "w4p", "static", bias_correction=flag),
            stats,
            quiet=True,
        ).state_dict()
        for flag in (False, True)
    )
    assert plain.keys() == corrected.keys()
    assert "transformer_blocks.0.attn1.to_q.bias" not in plain
    changed = {name for name, tensor in plain.items() if not torch.equal(tensor, corrected[name])}
    assert changed == {"proj_out_1.bias"} | {
        f"transformer_blocks.{block}.{name}.bias"
        for block in (0, 1)
        for name in ("norm1.linear", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    }


def test_a_linear_without_a_bias_is_rounded_for_all_of_its_inputs(make_dit, tmp_path):
    """Nothing takes the mean error back there, so its rows may not be centred: codes as without correction."""
    model = make_dit(3, attention_bias=False)
    stats = calibrate(model, tmp_path / "stats", steps=3, samples=1, rows=8, quiet=True)
    recipes = (
        Recipe("linear", "w4p", rounding="gptq", bias_correction=flag) for flag in (False, True)
    )
    plain, corrected = (convert(model, r, stats, quiet=True).state_dict() for r in recipes)
    name = "transformer_blocks.0.{}.weight"
    assert torch.equal(plain[name.format("attn1.to_q")], corrected[name.format("attn1.to_q")])
    assert not torch.equal(plain[name.format("ff.net.2")], corrected[name.format("ff.net.2")])


def test_linears_that_stay_float_keep_their_bias(model, stats):
    recipe = Recipe("linear", "w4p", keep=("*.ff.net.2",), bias_correction=True)
    packed = convert(model, recipe, stats, quiet=True)
    for name in ("transformer_blocks.0.ff.net.2", "transformer_blocks.1.ff.net.2"):
        assert torch.equal(packed.get_submodule(name).bias, model.get_submodule(name).bias)


def test_it_needs_rows_and_says_so(model, tmp_path):
    recipe = Recipe("linear", bias_correction=True)
    with pytest.raises(ValueError, match=r"to_q: bias correction needs statistics"):
        convert(model, recipe, quiet=True)
    bare = calibrate(model, tmp_path / "stats", steps=2, samples=1, rows=0, quiet=True)
    with pytest.raises(StatisticsError, match=r"no sampled rows; calibrate .* --rows 64"):
        convert(model, recipe, bare, quiet=True)
