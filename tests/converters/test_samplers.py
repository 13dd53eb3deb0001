"""Samplers against their papers' formulas, diffusers' pipeline and the official DiT code's arithmetic."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from ditq_converters import calibrate
from ditq_converters.calibrate.samplers import SAMPLERS, history, make_scheduler
from ditq_converters.calibrate.trajectory import SamplingPlan, noise_generator, trajectory

LABELS = (3, 207, 999)


def with_scheduler(pipe, scheduler):
    pipe.scheduler = scheduler
    return pipe


def calls_of(pipe, sampler, **plan):
    plan = SamplingPlan(LABELS, **{"steps": 4, "guidance": 2.0, **plan})
    return list(trajectory(pipe.transformer, make_scheduler(pipe, sampler), plan))


@pytest.mark.parity("P20")
@pytest.mark.parametrize(
    ("scheduler", "highest"),
    [
        (DDIMScheduler(), 999),
        (DDIMScheduler(timestep_spacing="trailing"), 999),
        (DDPMScheduler(timestep_spacing="linspace", steps_offset=1), 999),
        (DDPMScheduler(num_train_timesteps=400), 399),
        (DPMSolverMultistepScheduler(timestep_spacing="leading"), 999),
        (DPMSolverMultistepScheduler(use_karras_sigmas=True), 999),
        (FlowMatchEulerDiscreteScheduler(), 1000),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 1000),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 1000),
        (None, 999),
    ],
)
@pytest.mark.parametrize("steps", [None, 1, 20])
def test_t_max_is_one_forward_at_the_highest_noise(
    make_pipeline, tmp_path, capsys, scheduler, highest, steps
):
    """P20, for every supported scheduler. A one-step grid of the scheduler itself would begin at 0 or 500."""
    pipe, seen = make_pipeline(), []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].clone(), kwargs["timestep"])), with_kwargs=True
    )
    source = with_scheduler(pipe, scheduler) if scheduler is not None else pipe.transformer
    stats = calibrate(source, tmp_path, steps, samples=3, guidance=1.0, sampler="t_max")
    ((latents, times),) = seen
    assert times.tolist() == [highest] * 3
    noise = [torch.randn(4, 8, 8, generator=noise_generator(0, n, 0)) for n in range(3)]
    assert torch.equal(latents, torch.stack(noise))  # x_T ~ N(0, 1), not scaled
    assert (stats.calls, stats.timesteps) == (1, [float(highest)])
    assert ("makes one call, at the highest noise, not 20" in capsys.readouterr().err) == (
        steps == 20
    )


def learned_range_step(x, output, index, grid, noise):
    """OpenAI's guided diffusion in numpy fp64: respaced betas, q_posterior_mean_variance, LEARNED_RANGE."""
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[grid]  # ascending
    previous = np.append(1.0, bars[:-1])
    betas = 1 - bars / previous
    epsilon, v = np.split(output, 2, axis=1)
    start = np.sqrt(1 / bars[index]) * x - np.sqrt(1 / bars[index] - 1) * epsilon
    variance = betas * (1 - previous) / (1 - bars)
    mean = (
        betas[index] * np.sqrt(previous[index]) / (1 - bars[index]) * start
        + (1 - previous[index]) * np.sqrt(1 - betas[index]) / (1 - bars[index]) * x
    )
    if index == 0:
        return mean
    low, high = np.log(variance[index]), np.log(betas[index])
    return mean + np.exp(0.5 * ((v + 1) / 2 * high + (1 - (v + 1) / 2) * low)) * noise


@pytest.mark.parametrize(("guidance", "cfg_channels"), [(1.0, None), (2.5, None), (2.5, 3)])
def test_ddpm_is_the_official_sampler_with_learned_variance(make_pipeline, guidance, cfg_channels):
    pipe, plan = make_pipeline(), {"steps": 4, "guidance": guidance, "cfg_channels": cfg_channels}
    calls = calls_of(pipe, "ddpm", seed=5, **plan)
    grid = np.round(np.linspace(0, 999, 4)).astype(int)
    assert [call.timestep for call in calls] == grid[::-1].tolist() == [999, 666, 333, 0]
    for call, index in zip(calls, (3, 2, 1, 0), strict=True):
        times = torch.full((3,), int(grid[index]))
        with torch.no_grad():
            cond = pipe.transformer(call.latents, timestep=times, class_labels=torch.tensor(LABELS))
            null = pipe.transformer(
                call.latents, timestep=times, class_labels=torch.full((3,), 1000)
            ).sample
        output, guided = cond.sample, cfg_channels or 4
        if (
            guidance > 1
        ):  # forward_with_cfg: the other channels and the variance are the first half's
            mixed = null + guidance * (output - null)
            output = torch.cat([mixed[:, :guided], output[:, guided:]], dim=1)
        noise = torch.stack(
            [
                torch.randn(4, 8, 8, generator=noise_generator(5, n, call.index + 1))
                for n in range(3)
            ]
        )
        arrays = (t.double().numpy() for t in (call.latents, output))
        expected = torch.from_numpy(
            learned_range_step(*arrays, index, grid, noise.double().numpy())
        )
        # fp32 betas and latents, a division by sqrt(alpha bar) down to 0.0064: 6e-8 * 156 * |x| a few times
        bound = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(call.after.double(), expected, rtol=0, atol=bound)


def test_ddpm_without_a_learned_variance_uses_the_posterior(make_pipeline):
    """With v = -1 the learned range is at its lower end, which is the posterior variance."""
    pipe = make_pipeline(out_channels=4)
    (first, *_) = calls_of(pipe, "ddpm")
    output = np.concatenate([first.epsilon.double().numpy(), -np.ones((3, 4, 8, 8))], axis=1)
    noise = torch.stack(
        [torch.randn(4, 8, 8, generator=noise_generator(0, n, 1)) for n in range(3)]
    )
    grid = np.array([0, 333, 666, 999])
    expected = learned_range_step(
        first.latents.double().numpy(), output, 3, grid, noise.double().numpy()
    )
    bound = 1e-4 * float(np.abs(expected).max())
    torch.testing.assert_close(first.after.double(), torch.from_numpy(expected), rtol=0, atol=bound)


def test_ddpm_clips_where_the_scheduler_says_so(make_pipeline):
    clipped = calls_of(with_scheduler(make_pipeline(), DDIMScheduler(clip_sample=True)), "ddpm")
    assert clipped[-1].after.abs().max() <= 1  # the last step ends at the clean sample


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation"
)  # of diffusers, in the stock pipeline
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_dpmsolver_is_the_stock_pipeline(make_pipeline, steps):
    pipe, finals = make_pipeline(), []
    calls = calls_of(pipe, "dpmsolver++", steps=steps)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

    def decode(latents):
        finals.append(latents)
        return SimpleNamespace(sample=latents)

    pipe.vae.decode = decode
    generators = [noise_generator(0, n, 0) for n in range(3)]
    arguments = {"guidance_scale": 2.0, "num_inference_steps": steps, "output_type": "pt"}
    pipe(class_labels=list(LABELS), generator=generators, **arguments)
    # the same operations on the same batch, up to the order inside a GEMM: 6e-8 * sqrt(256) a layer and step
    bound = 1e-5 * float(finals[0].abs().max())
    torch.testing.assert_close(calls[-1].after, finals[0], rtol=0, atol=bound)


def test_flow_is_eulers_method_on_a_straight_schedule(make_pipeline):
    """x[i + 1] = x[i] + (sigma[i + 1] - sigma[i]) v, sigma shifted by 3 s / (1 + 2 s)."""
    pipe = with_scheduler(make_pipeline(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    calls = calls_of(pipe, "flow")
    # diffusers' grid runs from the shifted sigma_max = 1 to the shifted sigma_min, and is shifted once more
    lowest = 3 * 0.001 / (1 + 2 * 0.001)
    plain = np.linspace(1, lowest, 4)
    sigmas = np.append(3 * plain / (1 + 2 * plain), 0)
    for i, call in enumerate(calls):
        assert call.timestep == pytest.approx(1000 * sigmas[i], rel=1e-5)
        expected = call.latents.double() + (sigmas[i + 1] - sigmas[i]) * call.epsilon.double()
        # fp32 sigmas and sums: 6e-8 times the largest value, a few times
        torch.testing.assert_close(call.after.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++", "flow"])
@pytest.mark.parametrize("start", [1, 2, 4])
def test_a_resumed_run_equals_the_full_run_bit_for_bit(make_pipeline, sampler, start):
    own = FlowMatchEulerDiscreteScheduler() if sampler == "flow" else DDIMScheduler()
    pipe = with_scheduler(make_pipeline(), own)
    plan = SamplingPlan(LABELS, steps=6, seed=9, micro_batch=2)
    scheduler, full, before = make_scheduler(pipe, sampler), [], {}
    for call in trajectory(pipe.transformer, scheduler, plan):
        full.append(call)
        if call.index == start - 1:
            before = {name: tensor.clone() for name, tensor in history(scheduler).items()}
    assert len(before) == (min(start, 2) if sampler == "dpmsolver++" else 0)
    fresh = make_scheduler(pipe, sampler)
    latents = full[start].latents
    rest = list(trajectory(pipe.transformer, fresh, plan, start, latents, remembered=before))
    assert [call.index for call in rest] == list(range(start, 6))
    for resumed, call in zip(rest, full[start:], strict=True):
        assert resumed.timestep == call.timestep
        assert torch.equal(resumed.after, call.after)


def test_a_multistep_sampler_does_not_go_on_without_its_history(make_pipeline):
    pipe = make_pipeline()
    plan = SamplingPlan(LABELS, steps=6)
    scheduler = make_scheduler(pipe, "dpmsolver++")
    run = trajectory(pipe.transformer, scheduler, plan, 3, torch.zeros(3, 4, 8, 8))
    with pytest.raises(ValueError, match=r"resume at call 3: needs the last 2 model outputs"):
        next(run)


@pytest.mark.parametrize(("cfg_channels", "guided"), [(None, 4), (1, 1), (3, 3), (4, 4)])
def test_only_the_first_channels_are_guided(make_pipeline, cfg_channels, guided):
    pipe = make_pipeline()
    (call, *_) = calls_of(pipe, "ddim", guidance=3.0, cfg_channels=cfg_channels)
    halves = [
        calls_of(pipe, "ddim", guidance=1.0, null_label=1000)[0].epsilon,
        next(
            trajectory(
                pipe.transformer,
                make_scheduler(pipe, "ddim"),
                SamplingPlan((1000,) * 3, steps=4, guidance=1.0),
            )
        ).epsilon,
    ]
    cond, null = halves
    expected = torch.cat([(null + 3 * (cond - null))[:, :guided], cond[:, guided:]], dim=1)
    # another batch size may reorder the sums of a GEMM: 6e-8 * sqrt(256) relative, a few layers, times 3
    torch.testing.assert_close(call.epsilon, expected, rtol=0, atol=2e-5)
    assert (cond - null).abs().amax(dim=(0, 2, 3)).min() > 1e-3  # guidance matters in every channel


@pytest.mark.parametrize(
    ("own", "sampler", "sentence"),
    [
        (DDIMScheduler(), "euler", "must be one of ddim, ddpm, dpmsolver\\+\\+, flow, t_max"),
        (DDIMScheduler(), "flow", "flow does not fit .* DDIMScheduler; use ddim"),
        (FlowMatchEulerDiscreteScheduler(), "ddim", "ddim does not fit .*; use flow or t_max"),
        (FlowMatchEulerDiscreteScheduler(), "ddpm", "use flow or t_max"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "flow", "dynamic_shifting"),
        (DDIMScheduler(prediction_type="v_prediction"), "ddpm", "must predict epsilon"),
    ],
)
def test_samplers_that_do_not_fit_are_refused(own, sampler, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_scheduler(SimpleNamespace(scheduler=own), sampler)


def test_too_many_ddpm_steps_are_refused():
    with pytest.raises(ValueError, match="at most 1000, got 1001"):
        make_scheduler(None, "ddpm").set_timesteps(1001)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_calibrates_a_bare_transformer(make_dit, tmp_path, sampler):
    steps = 1 if sampler == "t_max" else 3
    stats = calibrate(make_dit(), tmp_path, steps, samples=2, sampler=sampler, quiet=True)
    assert (stats.calls, stats.manifest["sampler"]) == (steps, sampler)
    low, high = stats.ranges("transformer_blocks.1.fc2")
    assert bool((low <= high).all())
    assert stats.rows("transformer_blocks.1.fc2")[0].shape == (steps, 64, 256)
