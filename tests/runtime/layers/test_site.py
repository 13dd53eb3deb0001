"""Site: the quantizer of what linears share, against numpy one fp32 step at a time; and linears that read it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from ditq_runtime import LayerFormat, QuantLinear
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.layers.carrier import here
from ditq_runtime.layers.site import Site

K, N, SAMPLES, TOKENS = 64, 40, 2, 3
ACTIVATIONS = ("token", "token_asym", "static")
F = np.float32


def rng(seed):
    return np.random.default_rng(seed)


def site_of(activations, smooth=False, shifts=0):
    """A site that applies all itself, and its tensors as numpy."""
    stored = {
        "smooth_inv": rng(1).uniform(0.1, 2, K).astype(F),
        "shift": rng(2).normal(size=(max(shifts, 1), K)).astype(F),
        "act_scale": np.array([0.037], F),
        "act_zero": np.array([-21], np.int32),
    }
    form = SiteFormat(("linear",), activations, smooth=smooth, shifts=shifts)
    site = Site(K, form, "cpu")
    for name, parameter in site.named_parameters():
        parameter.data.copy_(torch.from_numpy(stored[name]))
    return site, stored


def rows(seed=3):
    x = rng(seed).normal(size=(SAMPLES * TOKENS, K)).astype(F) * 2 + 1
    x[0] = 0
    x[1, 5] *= 40
    return x


def transformed(x, site, stored, index):
    """fl(fl(x - z[g]) * u)."""
    if site.format.shifts:
        x = x - (stored["shift"][0] if index is None else stored["shift"][index])
    return x * stored["smooth_inv"] if site.format.smooth else x


def quantized(x, activations, stored):
    """Codes, steps [T] and zero points [T] of transformed rows; the formulas of docs/format.md."""
    if activations == "static":
        step, zero = np.repeat(stored["act_scale"], len(x)), np.repeat(stored["act_zero"], len(x))
        codes = np.rint(x * (F(1) / step)[:, None]) + zero[:, None]
        return np.clip(codes, -128, 127), step, zero
    if activations == "token":
        step = np.maximum(np.abs(x).max(1) / F(127), F(2.0**-40))
        return np.clip(np.rint(x * (F(1) / step)[:, None]), -127, 127), step, np.zeros(len(x))
    low, high = np.minimum(x.min(1), F(0)), np.maximum(x.max(1), F(0))
    step = np.maximum((high - low) / F(255), F(2.0**-40))
    inverse = F(1) / step
    zero = np.clip(np.rint(-low * inverse), 0, 255)
    codes = np.clip(np.rint(x * inverse[:, None]), -zero[:, None], 255 - zero[:, None])
    return zero[:, None] - 128 + codes, step, zero - 128


GROUPS = {  # shifts -> timestep group of each sample, or of each token; and of each row
    0: (None, None),
    1: (None, None),
    3: ([2, 0], [2, 2, 2, 0, 0, 0]),
    4: ([[3, 0, 1], [2, 2, 0]], [3, 0, 1, 2, 2, 0]),
}


@pytest.fixture
def groups():
    """Number of shifts -> group of every row, which the forward then carries."""

    def carry(shifts):
        carried, of_rows = GROUPS[shifts]
        here().index = None if carried is None else torch.tensor(carried)
        return of_rows

    yield carry
    here().index = None


@pytest.mark.parametrize("shifts", GROUPS)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_codes_equal_numpy(activations, smooth, shifts, groups):
    site, stored = site_of(activations, smooth, shifts)
    index = groups(shifts)
    codes, step, zero = quantized(transformed(rows(), site, stored, index), activations, stored)
    got = site(torch.from_numpy(rows()))
    assert np.array_equal(got.q.numpy(), codes)
    assert np.array_equal(np.broadcast_to(got.scale.numpy(), step.shape), step)
    if activations == "token":
        assert got.zero_point is None
    else:
        assert np.array_equal(np.broadcast_to(got.zero_point.numpy(), zero.shape), zero)


@pytest.mark.parametrize("weights", ["w8", "w4p", "w4g"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_linear_takes_the_zero_points_of_its_tokens_back(weights, rank):
    """Codes minus zero point times weights, exactly; then a scale, a branch and a bias: fp32 roundings."""
    import ditq_kernels as k

    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(4))
    made = {
        "w8": k.quantize_weight_w8,
        "w4p": lambda w: k.quantize_weight_w4p(w, 32),
        "w4g": lambda w: k.quantize_weight_w4g(w, 32),
    }[weights](weight)
    form = LayerFormat(weights, "token_asym", None if weights == "w8" else 32, lora_rank=rank)
    layer = QuantLinear(K, N, form, device="cpu")
    parts = {"w8": {"weight": "qweight"}}.get(weights, {"weight": "packed"})
    parts |= {"weight_scale": "scale", "group_scale": "group_scale"}
    parts |= {"group_offset": "group_offset", "weight_zero": "weight_zero"}
    for name, parameter in layer.named_parameters():
        parameter.data = torch.randn(parameter.shape).to(parameter.dtype) / 8
        if name in parts:
            parameter.data = getattr(made, parts[name])
    layer.weight_sum.data = made.weight_sum()
    site, stored = site_of("token_asym", smooth=True)
    layer.read(site)
    codes, step, zero = quantized(transformed(rows(), site, stored, None), "token_asym", stored)
    x = (codes - zero[:, None]).astype(np.float64) * step.astype(np.float64)[:, None]
    product = x @ made.dequantize().double().numpy().T
    truth = product + layer.bias.double().numpy()
    slack = 0.0
    if rank:
        down, up = (t.detach().double().numpy() for t in (layer.lora_down, layer.lora_up))
        truth = truth + x @ down.T @ up.T
        slack = 2.0**-8 * 1.01 * np.abs(x @ down.T) @ np.abs(up.T)  # bf16 between its factors
    # sums of K and of J terms err by their number of roundings of the sums of magnitudes
    magnitude = np.abs(x) @ np.abs(made.dequantize().double().numpy().T) + np.abs(truth) + 1
    got = layer(torch.from_numpy(rows())).detach().double().numpy()
    assert (np.abs(got - truth) <= 2.0**-24 * (K + 8) * magnitude + slack).all()
    assert np.abs(zero).max() > 10


@pytest.mark.parametrize("shifts", [0, 1, 3])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_codes_behind_gelu_and_adaln_are_those_of_their_values(activations, shifts, groups):
    """GELU is within 2**-21 of |x| and LN sums in any order: codes may stand one step off where a value is a tie."""
    site, _ = site_of(activations, smooth=True, shifts=shifts)
    groups(shifts)
    x = torch.from_numpy(rows())
    gelu = site(nn.functional.gelu(x.double(), approximate="tanh").float())
    multiplier, shift = torch.randn(SAMPLES, K), torch.randn(SAMPLES, K)
    normed = nn.functional.layer_norm(x.double(), (K,), eps=1e-6)
    spread = [t.repeat_interleave(TOKENS, 0).double() for t in (multiplier, shift)]
    adaln = site((normed * spread[0] + spread[1]).float())
    pairs = [(site.of_gelu(x), gelu), (site.of_adaln(x, multiplier, shift, 1e-6), adaln)]
    for got, expected in pairs:
        assert int((got.q.int() - expected.q.int()).abs().max()) <= 1
        assert float((got.q != expected.q).float().mean()) < 0.02
        torch.testing.assert_close(got.scale, expected.scale, rtol=1e-5, atol=0)
        assert (got.zero_point is None) == (expected.zero_point is None)


@pytest.mark.parametrize("shifts", GROUPS)
def test_what_is_quantized_can_be_looked_at(shifts, groups):
    site, stored = site_of("static", smooth=True, shifts=shifts)
    expected = transformed(rows(), site, stored, groups(shifts))
    assert np.array_equal(site.transformed(torch.from_numpy(rows())).numpy(), expected)


def test_static_codes_are_left_by_what_comes_before_unless_something_is_subtracted():
    assert site_of("static")[0].leaves_codes
    assert not site_of("static", shifts=1)[0].leaves_codes
    assert not site_of("token")[0].leaves_codes


def block_of(*readers):
    """A block with one site and its readers, as they are installed."""
    block = nn.Module()
    block.ditq_sites = nn.ModuleDict({"in": site_of("static")[0]})
    for name in readers:
        layer = QuantLinear(K, N, LayerFormat("w8", "static"), device="cpu")
        for parameter in layer.parameters():
            parameter.data.zero_()
        layer.read(block.ditq_sites["in"])
        setattr(block, name, layer)
    return block


def test_readers_share_one_site_that_is_no_submodule_of_theirs():
    block = block_of("a", "b")
    assert [name for name in block.state_dict() if "act_" in name] == [
        "ditq_sites.in.act_scale",
        "ditq_sites.in.act_zero",
    ]
    assert not list(block.a.children())
    twin = copy.deepcopy(block)
    assert twin.a.site is twin.b.site is twin.ditq_sites["in"]
    assert twin.a.site is not block.a.site
    moved = block.to("meta")
    assert moved.a.site.act_scale.is_meta
    assert twin.to(torch.bfloat16).a.site.act_scale.dtype == torch.float32


def test_hooks_of_the_site_fire_for_every_reader():
    block, seen = block_of("a", "b"), []
    block.ditq_sites["in"].register_forward_pre_hook(lambda *_: seen.append(1))
    x = torch.from_numpy(rows())
    block.a(x), block.b(x)
    assert len(seen) == 2
