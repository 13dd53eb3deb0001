"""The sampling loop against diffusers' own pipeline, and its counter-based noise."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ditq_converters.calibrate.trajectory import (
    SamplingPlan,
    initial_latents,
    predict,
    splitmix64,
    trajectory,
)

LABELS = (3, 207, 999, 0)


def mix(state):
    """The SplitMix64 step as Vigna's public-domain C code writes it, with explicit unsigned wrap."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = state
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def chained(*counters):
    state = 0
    for counter in counters:
        state = mix((state + counter) % 2**64)
    return state // 2


def prepared_noise(samples, seed=0, channels=4, size=8):
    """Independent initial noise: one torch generator per sample, seeded by counters (seed, sample, 0)."""
    noise = [
        torch.randn(
            channels, size, size, generator=torch.Generator().manual_seed(chained(seed, n, 0))
        )
        for n in range(samples)
    ]
    return torch.stack(noise)


def test_splitmix64_golden_values():
    """First outputs of the reference generator seeded with 0 and with 1234567 (its published test vectors)."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF >> 1
    assert splitmix64(1234567) == 6457827717110365317 >> 1


@pytest.mark.parametrize("counters", [(0, 0, 0), (7, 3, 49), (2**63, 5), (1, 0, -1), (2**64 - 1,)])
def test_splitmix64_chains_its_counters(counters):
    assert splitmix64(*counters) == chained(*counters)


def test_seeds_are_distinct_and_fit_torch():
    seeds = {splitmix64(s, n, c) for s in range(3) for n in range(20) for c in range(20)}
    assert len(seeds) == 3 * 20 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_initial_noise_is_one_generator_per_sample(make_dit):
    model = make_dit()
    few = initial_latents(SamplingPlan(LABELS[:2], seed=5), model)
    many = initial_latents(SamplingPlan(LABELS, seed=5, micro_batch=1), model)
    assert torch.equal(many, prepared_noise(4, seed=5))
    assert torch.equal(few, many[:2])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_loop_is_the_stock_pipeline(make_pipeline, guidance):
    """DiTPipeline on the same initial latents; its VAE hands over the latents it is given."""
    pipe, finals = make_pipeline(), []

    def decode(latents):
        finals.append(latents)
        return SimpleNamespace(sample=latents)

    pipe.vae.decode = decode
    generators = [torch.Generator().manual_seed(chained(0, n, 0)) for n in range(4)]
    pipe(
        class_labels=list(LABELS),
        guidance_scale=guidance,
        generator=generators,
        num_inference_steps=5,
        output_type="pt",
    )
    plan = SamplingPlan(LABELS, steps=5, guidance=guidance)
    *_, last = trajectory(pipe.transformer, pipe.scheduler, plan)
    (stock,) = finals
    # the same operations on the same batch: only the order inside a GEMM may differ, 6e-8 * sqrt(256) a layer
    # and 5 steps, so 1e-5 of the range leaves room and sees any wrong formula
    torch.testing.assert_close(last.after, stock, rtol=0, atol=1e-5 * float(stock.abs().max()))


def test_calls_are_linked_and_ordered(make_pipeline):
    pipe = make_pipeline()
    plan = SamplingPlan(LABELS, steps=4, seed=2)
    calls = list(trajectory(pipe.transformer, pipe.scheduler, plan))
    assert [call.index for call in calls] == [0, 1, 2, 3]
    assert [call.timestep for call in calls] == [750, 500, 250, 0]  # DDIM, leading spacing
    assert torch.equal(calls[0].latents, prepared_noise(4, seed=2))
    for before, after in itertools.pairwise(calls):
        assert torch.equal(after.latents, before.after)


def test_one_ddim_step_by_hand(make_pipeline):
    """x' = sqrt(a') (x - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - a') e, with a the product of 1 - beta."""
    pipe = make_pipeline()
    plan = SamplingPlan(LABELS, steps=2, guidance=1.0)
    first, _ = trajectory(pipe.transformer, pipe.scheduler, plan)
    with torch.no_grad():
        output = pipe.transformer(
            first.latents, timestep=torch.full((4,), 500), class_labels=torch.tensor(LABELS)
        ).sample
    assert torch.equal(first.epsilon, output[:, :4])
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    products = (1 - betas).cumprod(0)
    now, then = float(products[500]), float(products[0])
    x, e = first.latents.double(), first.epsilon.double()
    clean = (x - math.sqrt(1 - now) * e) / math.sqrt(now)
    expected = math.sqrt(then) * clean + math.sqrt(1 - then) * e
    # the scheduler's fp32 table: a product of 500 factors, 500 * 6e-8, amplified by 1 / sqrt(a) = 3.6
    torch.testing.assert_close(first.after.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("guidance", "halves"), [(0.0, 1), (1.0, 1), (1.01, 2), (4.0, 2)])
def test_a_null_half_runs_only_under_guidance(make_dit, guidance, halves):
    model, seen = make_dit(), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    plan = SamplingPlan(LABELS, guidance=guidance, micro_batch=3, null_label=1000)
    with torch.no_grad():
        predict(model, prepared_noise(4), torch.tensor(500), plan)
    if halves == 1:
        assert seen == [[3, 207, 999], [0]]
    else:
        assert seen == [[3, 207, 999, 1000, 1000, 1000], [0, 1000]]


def test_guidance_is_null_plus_weighted_difference(make_dit):
    model, latents = make_dit(), prepared_noise(4)
    with torch.no_grad():
        guided = predict(model, latents, torch.tensor(300), SamplingPlan(LABELS, guidance=3.0))
        times = torch.full((4,), 300)
        cond = model(latents, timestep=times, class_labels=torch.tensor(LABELS)).sample[:, :4]
        null = model(latents, timestep=times, class_labels=torch.full((4,), 1000)).sample[:, :4]
    assert guided.shape == latents.shape
    # another batch size may reorder the sums of a GEMM: 6e-8 * sqrt(256) relative, a few layers, times 3
    torch.testing.assert_close(guided, null + 3 * (cond - null), rtol=0, atol=2e-5)
    assert (guided - cond).abs().max() > 1e-3  # the two halves do differ


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("start", [1, 3])
def test_a_resumed_run_equals_the_full_run_bit_for_bit(make_dit, scheduler, start):
    model, plan = make_dit(), SamplingPlan(LABELS, steps=5, seed=9, micro_batch=3)
    full = list(trajectory(model, scheduler(clip_sample=False), plan))
    before = full[start].latents.clone()
    rest = list(trajectory(model, scheduler(clip_sample=False), plan, start, before))
    assert [call.index for call in rest] == list(range(start, 5))
    for resumed, call in zip(rest, full[start:], strict=True):
        for field in ("timestep", "latents", "epsilon", "after"):
            assert torch.equal(
                torch.as_tensor(getattr(resumed, field)), torch.as_tensor(getattr(call, field))
            )


def test_ddpm_noise_depends_on_seed_sample_and_call_alone(make_dit):
    """The noise a step added is what its result differs by between two seeds of the sampler's own noise."""
    model = make_dit()
    finals = {}
    for micro_batch in (1, 2, 4):
        plan = SamplingPlan(LABELS, steps=3, seed=4, micro_batch=micro_batch)
        *_, last = trajectory(model, DDPMScheduler(clip_sample=False), plan)
        finals[micro_batch] = last.after
    prefix = SamplingPlan(LABELS[:2], steps=3, seed=4)
    *_, last = trajectory(model, DDPMScheduler(clip_sample=False), prefix)
    size = finals[4].abs().max()
    # only the order of sums in a GEMM differs: 6e-8 * sqrt(256) a layer, through 3 calls
    for micro_batch in (1, 2):
        assert (finals[micro_batch] - finals[4]).abs().max() < 1e-5 * size
    assert (last.after - finals[4][:2]).abs().max() < 1e-5 * size


def test_ddpm_draws_fresh_noise_at_every_call(make_dit):
    model, seen = make_dit(), []
    scheduler = DDPMScheduler(clip_sample=False)
    step = scheduler.step

    def spy(epsilon, timestep, current, generator):
        seen.append([g.initial_seed() for g in generator])
        return step(epsilon, timestep, current, generator=generator)

    scheduler.step = spy
    list(trajectory(model, scheduler, SamplingPlan(LABELS, steps=3, seed=4)))
    assert seen == [[chained(4, n, call + 1) for n in range(4)] for call in range(3)]


def test_before_call_is_told_before_the_model_runs(make_dit):
    model, order = make_dit(), []
    model.register_forward_pre_hook(lambda *_: order.append("model"))
    plan = SamplingPlan(LABELS, steps=2, micro_batch=2)
    list(trajectory(model, DDIMScheduler(), plan, before_call=order.append))
    assert order == [0, "model", "model", 1, "model", "model"]


def test_a_bf16_model_keeps_fp32_latents(make_dit):
    model = make_dit().bfloat16()
    call = next(trajectory(model, DDIMScheduler(clip_sample=False), SamplingPlan(LABELS, steps=1)))
    assert (call.epsilon.dtype, call.after.dtype) == (torch.float32, torch.float32)
    assert torch.equal(call.latents, prepared_noise(4))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"micro_batch": -1}, "micro_batch must be at least 1, got -1"),
        ({"labels": ()}, "at least one sample"),
    ],
)
def test_empty_plans_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingPlan(**{"labels": LABELS, **fields})
