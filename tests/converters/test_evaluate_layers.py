"""Errors of forced blocks, the halves of guidance, and what static ranges cut off."""

import pytest
import torch
from diffusers import DDIMScheduler

from ditq_converters.calibrate.trajectory import SamplingPlan
from ditq_converters.evaluate import cascade_errors, forced_errors, halves_sqnr, run
from ditq_converters.evaluate.clipping import ClipCounter
from ditq_converters.evaluate.layer_error import CASCADE, FORCED
from ditq_converters.evaluate.sqnr import subset
from ditq_runtime import LayerFormat, QuantLinear
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.layers.site import Site

PLAN = SamplingPlan((3, 207, 999), steps=2, guidance=2.0, seed=1, micro_batch=2)


def calls_of(model, plan=PLAN):
    return run(model, DDIMScheduler(clip_sample=False), plan)


@pytest.fixture(scope="module")
def model(make_dit):
    return make_dit()


@pytest.fixture(scope="module")
def calls(model):
    return calls_of(model)


def test_a_forced_error_stays_in_the_block_that_makes_it(model, calls, make_dit):
    other = make_dit()
    other.transformer_blocks[0].ff.net[2].weight *= 1.5
    told = []
    forced = forced_errors(model, other, calls, PLAN, lambda: told.append(1))
    assert forced.mode == FORCED
    assert forced.names == ["transformer_blocks.0", "transformer_blocks.1"]
    assert bool((forced.relative[0] > 1e-3).all())
    assert torch.count_nonzero(forced.relative[1]) == 0  # in cascade it would be hit too
    assert len(told) == 2
    assert all(not m._forward_hooks for m in [*model.modules(), *other.modules()])
    assert all(not m._forward_pre_hooks for m in [*model.modules(), *other.modules()])
    cascade = cascade_errors(model, other, calls, PLAN)
    row = cascade.names.index("transformer_blocks.1.ff.net.2")
    assert bool((cascade.relative[row] > 1e-3).all())


@torch.no_grad()
def test_a_forced_error_equals_the_block_called_by_hand(model, calls, make_dit):
    other = make_dit()
    other.transformer_blocks[1].ff.net[2].weight *= 1.5
    seen = []
    hook = model.transformer_blocks[1].register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    calls_of(model)
    hook.remove()
    assert len(seen) == 2 * 2  # calls x micro-batches; the first call's two are 0 and 1
    outputs = [(other.transformer_blocks[1](*a, **k), y) for a, k, y in seen[:2]]
    noise = sum((yq - y).double().square().sum() for yq, y in outputs)
    signal = sum(y.double().square().sum() for _, y in outputs)
    forced = forced_errors(model, other, calls, PLAN)
    assert float(forced.relative[1, 0]) == pytest.approx(float((noise / signal).sqrt()), rel=1e-6)
    largest = max(float((yq - y).abs().max()) for yq, y in outputs)
    assert float(forced.max_abs[1, 0]) == pytest.approx(largest, rel=1e-6)


def test_all_measures_of_a_known_error(model, calls, make_dit):
    """The last linear's output is scaled by 1.25: error 0.25, so 12.04 dB, and no angle."""
    other = make_dit()
    last = other.transformer_blocks[1].ff.net[2]
    last.weight *= 1.25
    last.bias *= 1.25
    errors = cascade_errors(model, other, calls, PLAN)
    assert errors.mode == CASCADE
    row = errors.names.index("transformer_blocks.1.ff.net.2")
    torch.testing.assert_close(
        errors.sqnr_db[row], torch.full((2,), 12.0412).double(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(errors.cosine[row], torch.ones(2).double(), rtol=1e-9, atol=0)
    assert bool((errors.max_abs[row] > 0).all())
    first = errors.names.index("transformer_blocks.0.attn1.to_q")
    assert bool(errors.sqnr_db[first].isinf().all())
    assert errors.max_abs[first].tolist() == [0, 0]


class Halved(torch.nn.Module):
    """A transformer with another relative error for the null class than for all others."""

    def __init__(self, model, cond, null):
        super().__init__()
        self.model, self.factors = model, (cond, null)

    def forward(self, hidden_states, timestep, class_labels):
        out = self.model(hidden_states, timestep=timestep, class_labels=class_labels)
        cond, null = self.factors
        factor = torch.where(class_labels == 1000, null, cond)
        out.sample = out.sample * factor[:, None, None, None]
        return out


# it is called as one; models are known by their class's name
Halved.__name__ = "DiTTransformer2DModel"


def test_halves_are_measured_on_their_own(model, calls):
    """Noise of 0.1 of the signal is 20 dB, of 0.01 is 40 dB; on equal latents free is forced."""
    packed, told = Halved(model, 1.1, 0.99), []
    curves = halves_sqnr(model, packed, calls, calls, PLAN, lambda: told.append(1))
    assert list(curves) == ["cond", "null"]
    for half, decibels in (("cond", 20), ("null", 40)):
        for kind in ("free", "forced"):
            # fp32 rounds 1.1 and the product to 1e-7 of the signal: 1e-5 of the noise at 40 dB
            assert curves[half][kind].mean_of_ratios == pytest.approx([decibels] * 2, abs=1e-3)
    assert len(told) == 4


def test_halves_without_guidance_are_refused(model, calls):
    plan = SamplingPlan((3,), steps=2, guidance=1.0)
    with pytest.raises(ValueError, match="no null half"):
        halves_sqnr(model, model, calls, calls, plan)


def test_a_subset_has_the_first_samples(calls):
    few = subset(calls, 2)
    assert [call.index for call in few] == [0, 1]
    for ours, all_of_them in zip(few, calls, strict=True):
        for field in ("latents", "epsilon", "after"):
            assert torch.equal(getattr(ours, field), getattr(all_of_them, field)[:2])


def static_linear(smooth=False):
    layer = QuantLinear(4, 2, LayerFormat("w8", "static"), device="cpu")
    site = Site(4, SiteFormat(("linear",), "static", smooth=smooth), "cpu")
    layer.read(site)
    for parameter in layer.parameters():
        parameter.data.zero_()
    site.act_scale.data.fill_(0.5)
    site.act_zero.data.fill_(-28)
    return layer


def test_clipped_inputs_are_counted():
    """Codes -28 + x / 0.5 fit [-128, 127] for x in [-50, 77.5]; 77.7 still rounds to 127."""
    model = torch.nn.Sequential(static_linear(), torch.nn.Linear(2, 2))
    rows = torch.tensor([[-50.0, -50.6, 77.7, 77.8], [0.0, 1.0, 2.0, 3.0]])
    with ClipCounter(model) as counter:
        assert counter.names == ["0"]
        model(rows)
        assert counter.take().tolist() == [2 / 8]
        model(rows[1:])
        model(rows[:1])
        assert counter.take().tolist() == [2 / 8]  # over both forwards
    assert not model[0]._forward_pre_hooks


def test_a_clip_is_judged_after_smoothing():
    layer = static_linear(smooth=True)
    layer.site.smooth_inv.data.copy_(torch.tensor([1.0, 0.1, 10.0, 1.0]))
    with ClipCounter(torch.nn.Sequential(layer)) as counter:
        layer(torch.tensor([[60.0, 700.0, 10.0, 100.0]]))  # 60, 70, 100, 100
        assert counter.take().tolist() == [2 / 4]


def test_without_static_ranges_there_is_nothing_to_clip(model):
    with ClipCounter(model) as counter:
        assert counter.names == []
        assert counter.take().shape == (0,)
