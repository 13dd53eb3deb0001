"""Folding is exact: the whole model computes the same function, in both AdaLN forms."""

import copy

import pytest
import torch
from torch import nn

from ditq_converters.convert.fold import block_linears, fold_block, site_weight
from ditq_converters.methods import Transform
from ditq_runtime.families.dit import BLOCK, DIT

SITES = ("qkv", "o_proj", "fc1", "fc2")
SCALE_CHUNKS, SHIFT_CHUNKS, GATE_CHUNKS = (1, 4), (0, 3), (2, 5)  # diffusers' AdaLayerNormZero
WIDTH = 64
# fp64 rounds to 1.1e-16; sums of up to 256 terms and factors up to 5 through 2 blocks stay far below this
EXACT = 1e-12


def random_factors(model, seed=3):
    """Block -> site -> s, uniform in [0.2, 5]."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for block in DIT.block_names(model):
        factors[block] = {}
        for site in SITES:
            width = 4 * WIDTH if site == "fc2" else WIDTH
            uniform = torch.rand(width, generator=generator, dtype=torch.float64)
            factors[block][site] = 0.2 + 4.8 * uniform
    return factors


def smoothing(factors):
    return {site: Transform(s) for site, s in factors.items()}


def folded_copy(model, factors, scale_bias):
    """A stock fp64 model with the folded tensors, after `scale_bias(bias rows, u)` on its scale chunks."""
    folded = copy.deepcopy(model)
    for name in DIT.block_names(model):
        block, s = folded.get_submodule(name), factors.get(name, {})
        linears = block_linears(model.get_submodule(name), BLOCK)
        on_the_fly = fold_block(linears, BLOCK, smoothing(s))
        assert set(on_the_fly) == ({"ff.net.2"} if "fc2" in s else set())
        sites = ("qkv", "fc1")
        for chunk, site in zip(SCALE_CHUNKS, sites, strict=True):
            rows = slice(chunk * WIDTH, (chunk + 1) * WIDTH)
            u = 1 / s[site] if site in s else torch.ones(WIDTH, dtype=torch.float64)
            bias = linears["norm1.linear"].bias
            bias[:, rows] = scale_bias(bias[:, rows], u)
        for layer, tensors in linears.items():
            module = block.get_submodule(layer)
            module.weight = nn.Parameter(tensors.weight, requires_grad=False)
            if tensors.bias is not None:
                module.bias = nn.Parameter(tensors.bias[0], requires_grad=False)
        if "fc2" in s:

            def divide(_, args, s=s["fc2"]):
                return (args[0] / s,)

            block.get_submodule("ff.net.2").register_forward_pre_hook(divide)
    return folded


def relative_error(model, folded, batch):
    with torch.no_grad():
        truth, other = model(**batch).sample, folded(**batch).sample
    assert truth.dtype == torch.float64
    return float((other - truth).abs().max() / truth.abs().max())


def compat(bias, u):
    return bias - 1


def canonical(bias, u):
    return bias


def direct(folded):
    for name in DIT.block_names(folded):
        BLOCK.use_direct_multiplier(folded.get_submodule(name))
    return folded


MODELS = {
    "stock": {},
    "attention without bias": {"attention_bias": False},
    "affine layer norm": {"norm_elementwise_affine": True},
}


@pytest.fixture(params=[*MODELS, "modulation without bias"])
def model(request, make_dit):
    model = make_dit(**MODELS.get(request.param, {})).double()
    if request.param == "modulation without bias":
        for block in model.transformer_blocks:
            block.norm1.linear.bias = None
    if request.param == "affine layer norm":
        for block in model.transformer_blocks:
            block.norm3.weight.uniform_(0.5, 2)
            block.norm3.bias.uniform_(-1, 1)
    return model


@pytest.mark.parity("P1")
def test_the_folded_model_is_the_same_function_in_stock_modules(model, inputs):
    folded = folded_copy(model, random_factors(model), compat)
    assert relative_error(model, folded, inputs(model)) < EXACT


@pytest.mark.parity("P1")
def test_the_folded_model_is_the_same_function_with_a_direct_multiplier(model, inputs):
    folded = direct(folded_copy(model, random_factors(model), canonical))
    assert relative_error(model, folded, inputs(model)) < EXACT


@pytest.mark.parametrize("sites", [("qkv",), ("o_proj",), ("fc1",), ("fc2",), ("o_proj", "fc2")])
def test_sites_fold_independently(make_dit, inputs, sites):
    model = make_dit().double()
    factors = {
        block: {site: s for site, s in every.items() if site in sites}
        for block, every in random_factors(model).items()
    }
    folded = direct(folded_copy(model, factors, canonical))
    assert relative_error(model, folded, inputs(model)) < EXACT


@pytest.mark.parametrize("width", [1e-4, 1e4])
def test_the_widest_factors_fold_too(make_dit, inputs, width):
    """s at the clamp; the bound grows with nothing, because u = 1 / s cancels it exactly but for rounding."""
    model = make_dit().double()
    factors = random_factors(model)
    for every in factors.values():
        for s in every.values():
            s[::3] = width
    folded = direct(folded_copy(model, factors, canonical))
    assert relative_error(model, folded, inputs(model)) < EXACT


def test_the_test_would_see_a_missing_constant(make_dit, inputs):
    """PTQ4DiT Eq. 20 to the letter drops u - 1 from a (1 + scale) module."""
    model = make_dit().double()
    folded = folded_copy(model, random_factors(model), lambda bias, u: bias - u)
    assert relative_error(model, folded, inputs(model)) > 0.05


def test_without_factors_only_the_one_is_added(make_dit):
    model = make_dit().double()
    block = model.transformer_blocks[1]
    linears = block_linears(block, BLOCK)
    assert fold_block(linears, BLOCK, {}) == {}
    for name, tensors in linears.items():
        module = block.get_submodule(name)
        torch.testing.assert_close(tensors.weight, module.weight, rtol=0, atol=0)
        expected = module.bias.clone()
        if name == "norm1.linear":
            for chunk in SCALE_CHUNKS:
                expected[chunk * WIDTH : (chunk + 1) * WIDTH] += 1
        torch.testing.assert_close(tensors.bias, expected[None], rtol=0, atol=0)


def test_gates_are_untouched(make_dit):
    model = make_dit().double()
    block, factors = model.transformer_blocks[0], random_factors(model)["transformer_blocks.0"]
    linears = block_linears(block, BLOCK)
    fold_block(linears, BLOCK, smoothing(factors))
    before, after = block.norm1.linear, linears["norm1.linear"]
    for chunk in range(6):
        rows = slice(chunk * WIDTH, (chunk + 1) * WIDTH)
        same = (
            torch.equal(after.weight[rows], before.weight[rows]),
            torch.equal(after.bias[0, rows], before.bias[rows]),
        )
        assert same == ((True, True) if chunk in GATE_CHUNKS else (False, False))


def test_attention_folds_by_hand(make_dit):
    """One element of each tensor: columns times s, rows of V and of the modulation times 1 / s."""
    model = make_dit().double()
    block, s = model.transformer_blocks[0], random_factors(model)["transformer_blocks.0"]
    linears = block_linears(block, BLOCK)
    on_the_fly = fold_block(linears, BLOCK, smoothing(s))
    attention, modulation = block.attn1, block.norm1.linear
    n, k = 5, 11
    expected = {
        "attn1.to_q": attention.to_q.weight[n, k] * s["qkv"][k],
        "attn1.to_v": attention.to_v.weight[n, k] * s["qkv"][k] / s["o_proj"][n],
        "attn1.to_out.0": attention.to_out[0].weight[n, k] * s["o_proj"][k],
        "ff.net.0.proj": block.ff.net[0].proj.weight[n, k] * s["fc1"][k],
        "ff.net.2": block.ff.net[2].weight[n, k] * s["fc2"][k],
    }
    for name, value in expected.items():
        torch.testing.assert_close(linears[name].weight[n, k], value, rtol=1e-15, atol=0)
    row = 4 * WIDTH + n  # scale_mlp
    torch.testing.assert_close(
        linears["norm1.linear"].bias[0, row], (modulation.bias[row] + 1) / s["fc1"][n]
    )
    torch.testing.assert_close(
        linears["attn1.to_v"].bias[0, n], attention.to_v.bias[n] / s["o_proj"][n]
    )
    torch.testing.assert_close(on_the_fly["ff.net.2"].smooth, s["fc2"], rtol=0, atol=0)


@pytest.mark.parity("P3")
def test_folding_through_v_equals_folding_the_product(make_dit):
    """Softmax rows sum to one: P ((V - z) u) = (P V - z) u, so the attention output may be shifted and scaled in V."""
    model = make_dit().double()
    attention, generator = model.transformer_blocks[0].attn1, torch.Generator().manual_seed(3)
    x = torch.randn(2, 16, WIDTH, generator=generator, dtype=torch.float64)
    z = torch.randn(1, WIDTH, generator=generator, dtype=torch.float64)
    s = torch.rand(WIDTH, generator=generator, dtype=torch.float64) + 0.1
    linears = block_linears(model.transformer_blocks[0], BLOCK)
    fold_block(linears, BLOCK, {"o_proj": Transform(s, z)})
    folded = linears["attn1.to_v"]
    probabilities = torch.softmax(x @ x.transpose(1, 2), dim=2)
    with torch.no_grad():
        product = (probabilities @ attention.to_v(x) - z) / s
    through_v = probabilities @ (x @ folded.weight.T + folded.bias)
    assert float((through_v - product).abs().max() / product.abs().max()) < EXACT
    with torch.no_grad():
        truth = attention.to_out[0](probabilities @ attention.to_v(x))
    out = linears["attn1.to_out.0"]
    assert float((through_v @ out.weight.T + out.bias - truth).abs().max()) < 1e-11


def test_the_model_is_not_changed(make_dit):
    model = make_dit().double()
    before = copy.deepcopy(model.state_dict())
    folded_copy(model, random_factors(model), compat)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_weight_of_a_site_covers_every_reader_of_the_site(make_dit):
    block = make_dit().transformer_blocks[0]
    block.attn1.to_k.weight[40, 9] = -7.0
    largest = site_weight(block_linears(block, BLOCK), BLOCK.sites[0]).abs().amax(0)
    readers = (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
    expected = torch.stack([reader.weight.double().abs().amax(0) for reader in readers]).amax(0)
    assert expected[9] == 7.0
    torch.testing.assert_close(largest, expected, rtol=0, atol=0)
