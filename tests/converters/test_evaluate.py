"""Figures of merit on errors of known size (P23)."""

import math

import pytest
import torch

from ditq_converters.evaluate import (
    Run,
    SqnrCurve,
    compare_runs,
    forced_sqnr,
    layer_errors,
    run,
    sqnr_db,
)
from ditq_converters.evaluate.layer_error import CASCADE, comparable_layers
from ditq_runtime.calls.inputs import gather
from ditq_runtime.calls.pipeline import SchedulerStep

HOW = {"labels": (0, 7, 1), "batch": 2, "steps": 3, "guidance": 2.0, "seed": 1}


@pytest.fixture(scope="module")
def pipe(make_pipeline):
    return make_pipeline()


@pytest.fixture(scope="module")
def ours(pipe):
    """A float run, every forward recorded."""
    return run(pipe, gather("test", pipe, **HOW), few=3)


def errors_of(pipe, other, ours, told=None):
    found = layer_errors(
        CASCADE, {"transformer": pipe.transformer}, {"transformer": other}, ours.calls, told
    )
    return found.names, found.relative


@pytest.mark.parity("P23")
@pytest.mark.parametrize("decibels", [0.0, 10.0, 37.5, 60.0])
def test_noise_of_known_power(decibels):
    """White noise of 10^(-dB / 10) of the power; 2 x 50,000 values estimate it to 4.34 * sqrt(2 / 1e5) = 0.02 dB
    one by one, so the noise is scaled to its exact power per sample."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(2, 4, 100, 125, generator=generator)
    noise = torch.randn(signal.shape, generator=generator)
    for one, other in zip(signal, noise, strict=True):
        other *= one.norm() / other.norm() * 10 ** (-decibels / 20)
    for value in sqnr_db(signal, signal + noise):
        assert value == pytest.approx(decibels, abs=0.01)


def test_the_two_conventions_by_hand():
    """Powers 4 and 100, noises 1 and 1: mean of ratios (4 + 100) / 2 = 52, ratio of sums 104 / 2 = 52; with noises
    1 and 4: (4 + 25) / 2 = 14.5 against 104 / 5 = 20.8."""
    signal = torch.tensor([[2.0, 0.0], [10.0, 0.0]])
    for noises, mean, total in (((1, 1), 52, 52), ((1, 2), 14.5, 20.8)):
        noise = torch.tensor([[0.0, float(noises[0])], [float(noises[1]), 0.0]])
        ratios, sums = sqnr_db(signal, signal + noise)
        assert ratios == pytest.approx(10 * math.log10(mean), abs=1e-9)
        assert sums == pytest.approx(10 * math.log10(total), abs=1e-9)


def test_equal_outputs_are_refused():
    signal = torch.ones(2, 3)
    with pytest.raises(ValueError, match="no quantization noise at all"):
        sqnr_db(signal, signal.clone())
    with pytest.raises(ValueError, match="no quantization noise at all"):
        sqnr_db(signal, signal + torch.tensor([[1.0], [0.0]]))


def test_outputs_that_are_not_finite_are_not_called_equal():
    signal = torch.ones(2, 3)
    with pytest.raises(ValueError, match="finite"):
        sqnr_db(signal, signal * torch.tensor([[1.1], [torch.nan]]))


def test_a_curve_averages_decibels():
    curve = SqnrCurve([10.0, 20.0, 60.0], [9.0, 19.0, 59.0])
    assert curve.mean == 30.0
    assert curve.to_dict() == {
        "mean_db": 30.0,
        "mean_of_ratios_db": [10.0, 20.0, 60.0],
        "ratio_of_sums_db": [9.0, 19.0, 59.0],
    }


def made_of(*runs):
    return Run([[SchedulerStep(t, x) for t, x in steps] for steps in runs], [], None, None)


def test_free_sqnr_compares_step_by_step():
    signal = torch.full((2, 4), 3.0)
    float_run = made_of([(9.0, signal), (1.0, signal)])
    curve = compare_runs(float_run, made_of([(9.0, signal * 1.1), (1.0, signal * 1.01)]))
    assert curve.mean_of_ratios == pytest.approx([20.0, 40.0], abs=1e-4)  # fp32 products
    assert curve.ratio_of_sums == pytest.approx([20.0, 40.0], abs=1e-4)
    assert curve.timesteps == (9.0, 1.0)


def test_inputs_of_other_sizes_and_lengths_share_a_curve():
    """Noises 0.1 and 0.01 of the signal at one timestep: the mean of 100 and 10000 is 5050, 37.03 dB."""
    small, large = torch.full((1, 4), 3.0), torch.full((1, 9), 1.0)
    float_run = made_of([(9.0, small), (1.0, small)], [(1.0, large)])
    curve = compare_runs(
        float_run, made_of([(9.0, small * 1.1), (1.0, small * 1.1)], [(1.0, large * 1.01)])
    )
    assert curve.mean_of_ratios == pytest.approx([20.0, 10 * math.log10(5050)], abs=1e-4)


class DiTTransformer2DModel(torch.nn.Module):
    """A transformer whose output is multiplied by a factor; the name says how it is called."""

    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor, self.seen = model, factor, []

    def forward(self, hidden_states, **kwargs):
        self.seen.append(hidden_states)
        out = self.model(hidden_states, **kwargs)
        out.sample = out.sample * self.factor
        return out


def test_forced_sqnr_makes_the_float_models_calls(pipe, ours):
    told, scaled = [], DiTTransformer2DModel(pipe.transformer, 0.9)
    curve = forced_sqnr(ours.calls, {"transformer": scaled}, lambda: told.append(1))
    # the noise is a tenth of the signal: 20 dB; fp32 rounding 1e-7 of it
    assert curve.mean_of_ratios == pytest.approx([20.0] * 3, abs=1e-4)
    assert curve.timesteps == (666.0, 333.0, 0.0)
    assert len(told) == 2 * 3  # calls of both inputs
    assert [len(x) for x in scaled.seen] == [
        4,
        4,
        4,
        2,
        2,
        2,
    ]  # classes, and the null class as often


def test_a_run_is_what_the_pipeline_draws(make_pipeline):
    """Final latents and images against the pipeline itself, its predictions against an own guidance."""
    pipe, given = make_pipeline(), None
    given = gather("test", pipe, **HOW)
    found = run(pipe, given, few=1, decode=True)
    images = [
        pipe(
            **one.arguments,
            generator=[torch.Generator().manual_seed(seed) for seed in one.seeds],
            output_type="pt",
        ).images
        for one in given
    ]
    assert torch.equal(found.images, 2 * torch.cat(images) - 1)
    assert found.latents.shape == (3, 4, 8, 8)
    with torch.no_grad():
        drawn = pipe.vae.decode(found.latents).sample.clamp(-1, 1)
    # in one batch instead of two: sums in another order
    torch.testing.assert_close(found.images, drawn, rtol=0, atol=1e-5)
    assert [len(calls) for calls in found.calls] == [3]  # of the first input only
    output = found.calls[0][0].output[:, :4]
    cond, null = output.chunk(2)
    guided = null + 2.0 * (cond - null)
    assert torch.equal(found.steps[0][0].prediction, torch.cat([guided, guided]))


def test_the_layers_that_compare(make_dit):
    names = comparable_layers(make_dit())
    inside = ("attn1.to_q", "attn1.to_k", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    assert names == [f"transformer_blocks.{i}.{name}" for i in range(2) for name in inside]


def test_a_model_against_itself_has_no_error(pipe, ours, make_dit):
    names, errors = errors_of(pipe, make_dit(), ours)
    assert errors.shape == (10, 3)
    assert errors.dtype == torch.float64
    assert torch.count_nonzero(errors) == 0
    assert len(names) == 10


def test_a_known_perturbation_is_as_computed(pipe, ours, make_dit):
    """The last linear of the last block is scaled by 1.25: its error is 0.25, and no other layer comes after it."""
    other, told = make_dit(), []
    last = other.transformer_blocks[1].ff.net[2]
    last.weight *= 1.25
    last.bias *= 1.25
    names, errors = errors_of(pipe, other, ours, lambda: told.append(1))
    row = names.index("transformer_blocks.1.ff.net.2")
    torch.testing.assert_close(errors[row], torch.full((3,), 0.25).double(), rtol=1e-6, atol=0)
    errors[row] = 0
    assert torch.count_nonzero(errors) == 0
    assert len(told) == 2 * 3
    assert all(not m._forward_hooks for m in [*pipe.transformer.modules(), *other.modules()])


def test_an_early_perturbation_cascades(pipe, ours, make_dit):
    other = make_dit()
    other.transformer_blocks[0].attn1.to_out[0].weight *= 1.5
    names, errors = errors_of(pipe, other, ours)
    touched = {name for name, row in zip(names, errors, strict=True) if bool((row > 0).any())}
    untouched = {"transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_k"}
    assert set(names) - touched == untouched
