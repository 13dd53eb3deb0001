"""Simulated models: the exact part is exact, the lossy part is the profile's, and none can be saved as packed."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from ditq_bench.simulated import simulate
from ditq_bench.simulated.linear import SimulatedLinear
from ditq_bench.simulated.profiles import PROFILES, Profile
from ditq_bench.simulated.transforms import search_losses
from ditq_converters import Recipe, StatisticsError, calibrate
from ditq_converters.methods import SiteData
from ditq_converters.methods.ditas import ALPHAS
from ditq_converters.methods.smoothquant import smooth_factor
from ditq_runtime import QuantLinear

STEPS = 20  # two timestep groups


@pytest.fixture(scope="module")
def model(make_dit):
    return make_dit(5)


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    """Statistics, and the inputs of every forward that they were taken from."""
    out, calls = tmp_path_factory.mktemp("simulate") / "stats", []
    hook = model.register_forward_pre_hook(
        lambda module, args, inputs: calls.append({"hidden_states": args[0], **inputs}),
        with_kwargs=True,
    )
    stats = calibrate(model, out, steps=STEPS, samples=2, rows=8, quiet=True)
    hook.remove()
    return stats, calls


@pytest.fixture(scope="module")
def stats(calibration):
    return calibration[0]


@pytest.fixture(scope="module")
def seen(calibration):
    """A sample of four calls that calibration has seen, of both timestep groups."""
    picked = [calibration[1][call] for call in (0, 6, 13, STEPS - 1)]
    return {
        name: torch.cat([inputs[name][:1] for inputs in picked])
        for name in ("hidden_states", "timestep", "class_labels")
    }


@pytest.fixture(scope="module")
def batch():
    """Noise at any timestep: inputs that no trajectory has."""
    generator = torch.Generator().manual_seed(11)
    return {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([0, 300, 650, 950]),
        "class_labels": torch.tensor([1, 2, 3, 1000]),
    }


def forward(model, batch):
    with torch.no_grad():
        return model(**batch).sample


def error(model, other, batch):
    truth = forward(model, batch)
    return float((forward(other, batch) - truth).norm() / truth.norm())


# An int8 step is a 255th of a range of about 8 deviations: 8 / 255 / sqrt(12) = 0.9 % of noise per operand, 1.3 % per
# linear with the weight's. The 4 linears in a row of 2 blocks add up as sqrt(8) at most, residuals dilute it.
# A 4-bit step of the weights is 255 / 15 = 17 times as long.
AT_8_BITS, AT_4_BITS = 0.036, 0.44


@pytest.mark.parametrize(("method", "profile"), sorted(PROFILES))
def test_every_profile_is_close_at_8_bits_and_further_at_4(model, stats, seen, method, profile):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    errors = []
    for weights in ("w8", "w4p"):
        simulated = simulate(model, Recipe(method, weights), profile, stats)
        layers = [m for m in simulated.modules() if isinstance(m, SimulatedLinear)]
        assert len(layers) == 12
        assert not any(isinstance(m, QuantLinear) for m in simulated.modules())
        errors.append(error(model, simulated, seen))
    assert 1e-4 < errors[0] < AT_8_BITS
    assert errors[0] < errors[1] < AT_4_BITS
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_calibration_has_not_seen_is_clipped_and_that_is_all(model, stats, batch):
    """HTG centres the groups of its trajectory, so its static ranges are narrow; other inputs leave them.

    Ranges that hold them bring the error back below the bound: nothing but the clipping is wrong.
    """
    simulated = simulate(model, Recipe("htg"), "paper", stats)
    layers = [layer for layer in simulated.modules() if getattr(layer, "shift", None) is not None]
    clipped = []

    def look(layer, args):
        x = (args[0].double() - layer._of_sample(layer.shift, args[0])) / layer.smooth
        low, high = layer.act_range
        clipped.append(float(((x < low) | (x > high)).double().mean()))
        layer.act_range = torch.minimum(x.min(), low), torch.maximum(x.max(), high)

    narrow = error(model, simulated, batch)
    for layer in layers:
        layer.register_forward_pre_hook(look)
    widened = error(model, simulated, batch)
    assert len(clipped) == len(layers)
    assert max(clipped) > 0.1
    assert widened < AT_8_BITS < narrow


@pytest.mark.parametrize(("method", "profile"), sorted(PROFILES))
def test_without_rounding_it_is_the_model(model, stats, batch, method, profile, monkeypatch):
    """Shift, factor, groups and biases are exact: with quantizers that keep every value the function is the same."""
    keep = dict.fromkeys(("asymmetric", "symmetric", "ditas_code"), lambda x, low, high, bits: x)
    for module in ("granularity", "linear", "transforms"):
        monkeypatch.setattr(f"ditq_bench.simulated.{module}.RULES", keep)
    simulated = simulate(model, Recipe(method, "w4p", lora_rank=0), profile, stats)
    # the attention and norms stay fp32: 2^-24 times a few hundred operations
    assert error(model, simulated, batch) < 1e-5
    if method == "htg":
        layer = simulated.transformer_blocks[0].attn1.to_out[0]
        assert layer.shift.shape == (2, 64)  # behind V too, where the integer form has one for all


@pytest.mark.parity("P13")
def test_folded_channels_do_not_feel_alpha_and_others_do(model, stats, batch):
    outputs = {}
    for granularity in ("per_in_channel_folded", "per_in_group"):
        for alpha in (0.1, 0.8):
            recipe = Recipe("ditas", search=False, alpha=alpha, lora_rank=0)
            outputs[granularity, alpha] = forward(
                simulate(model, recipe, "paper", stats, granularity), batch
            )
    folded = [outputs["per_in_channel_folded", alpha] for alpha in (0.1, 0.8)]
    # equal in exact arithmetic; a code may fall on the other side of a tie
    torch.testing.assert_close(*folded, rtol=0, atol=1e-4)
    others = [outputs["per_in_group", alpha] for alpha in (0.1, 0.8)]
    assert float((others[0] - others[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("granularity", ["per_in_channel", "group_k"])
def test_the_branch_lowers_the_error(model, stats, batch, granularity):
    """Split before smoothing where that commutes, after it elsewhere."""
    errors = [
        error(model, simulate(
            model, Recipe("ditas", "w4p", lora_rank=rank), "paper", stats, granularity
        ), batch)
        for rank in (0, 16)
    ]  # fmt: skip
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parity("P21")
def test_a_dynamic_tensor_range_couples_the_batch_and_a_static_one_does_not(model, stats, batch):
    """Why it is simulated only: an image would depend on its batch mates."""
    alone = {key: value[:1] for key, value in batch.items()}
    for method, coupled in (("ditas", True), ("ptq4dit", False)):
        simulated = simulate(model, Recipe(method), "paper", stats)
        together, single = forward(simulated, batch)[:1], forward(simulated, alone)
        assert (float((together - single).abs().max()) > 1e-3) is coupled


def test_meta_takes_the_range_of_its_one_call(model, stats):
    simulated = simulate(model, Recipe("meta"), "paper", stats)
    low, high = stats.ranges("transformer_blocks.1.fc2")
    found = simulated.transformer_blocks[1].ff.net[2].act_range
    assert [end.item() for end in found] == [low[0].min().item(), high[0].max().item()]


def test_search_losses_are_those_of_the_definition():
    """DiTAS's code reads the first calls only; ranges are per call and tensor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 32, generator=generator) * torch.logspace(-1, 1, 32)
    weight = torch.randn(8, 32, generator=generator, dtype=torch.float64)
    full = torch.cat([x, 3 * x[:, :1]], dim=1)  # statistics see a row more
    site = SiteData(
        "fc1", full.amin(1), full.amax(1), weight, rows=x[[0, 2, 3]], row_calls=(0, 2, 3)
    )
    a = site.absmax.amax(0)

    def factor(alpha):
        return smooth_factor(a, site.weight_absmax, alpha)

    profile = Profile("dynamic_tensor", search_calls=2)
    losses = search_losses(site, profile, factor, lambda smooth: weight * smooth)
    for alpha, loss in zip(ALPHAS, losses, strict=True):
        expected, s = 0.0, factor(alpha)
        for call in (0, 2):
            scaled, whole = x[call].double() / s, full[call].double() / s
            low, high = min(whole.min().item(), 0), max(whole.max().item(), 0)
            step = (high - low) / 255
            rounded = (scaled / step).round() * step  # the range covers the rows: nothing clips
            expected += float(((rounded * s - x[call]) @ weight.T).square().sum())
        # half a step at the ends may clip by the rounding of the zero point
        assert loss == pytest.approx(expected / 2, rel=0.05)


def test_ssc_over_rows_differs_from_ssc_over_calls(model, stats):
    factors = [
        simulate(model, Recipe("ptq4dit"), profile, stats)
        .transformer_blocks[0].attn1.to_q.smooth
        for profile in ("paper", "code")
    ]  # fmt: skip
    assert not torch.allclose(*factors, rtol=1e-3)


def test_it_is_no_packed_model(model, stats):
    simulated = simulate(model, Recipe("ditas"), "paper", stats)
    assert "quantization_config" not in simulated.config
    assert isinstance(simulated, DiTTransformer2DModel)


def test_it_needs_rows_and_the_model_s_own_statistics(model, make_dit, stats, tmp_path):
    recipe = Recipe("htg")
    with pytest.raises(StatisticsError, match="belong to another model"):
        simulate(make_dit(6), recipe, "paper", stats)
    bare = calibrate(model, tmp_path / "stats", steps=2, samples=1, rows=0, quiet=True)
    with pytest.raises(StatisticsError, match="no sampled rows"):
        simulate(model, recipe, "paper", bare)
    with pytest.raises(ValueError, match="htg has no 'code' profile to simulate; there are: meta"):
        simulate(model, recipe, "code", stats)
