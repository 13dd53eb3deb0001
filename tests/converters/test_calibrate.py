"""Calibration: ranges as an independent recording has them, resumable to the byte, and nothing left behind."""

import weakref

import pytest
import torch
from diffusers import DDIMScheduler

from ditq_converters import StatisticsError, calibrate
from ditq_converters.calibrate.stats import shard_path
from ditq_converters.calibrate.trajectory import SamplingPlan, initial_latents

CONSUMERS = {
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "o_proj": ("attn1.to_out.0",),
    "fc1": ("ff.net.0.proj",),
    "fc2": ("ff.net.2",),
}
STEPS, SAMPLES, GUIDANCE = 3, 4, 2.0
SMALL = {"steps": STEPS, "samples": SAMPLES, "guidance": GUIDANCE, "quiet": True}


def record(model, labels, guidance=GUIDANCE):
    """Own loop, own hooks, one big batch: per call, site -> rows [2S, tokens, K] of every reader, cond half first."""
    seen, calls = {}, []
    hooks = []
    for index, block in enumerate(model.transformer_blocks):
        for site, names in CONSUMERS.items():
            for name in names:
                key = (f"transformer_blocks.{index}.{site}", name)

                def keep(_, args, key=key):
                    seen[key] = args[0].clone()

                hooks.append(block.get_submodule(name).register_forward_pre_hook(keep))
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    latents = initial_latents(SamplingPlan(labels), model)
    classes = torch.tensor([*labels, *[1000] * len(labels)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen.clear()
            double = torch.cat([latents, latents])
            out = model(double, timestep=t.expand(len(double)), class_labels=classes).sample[:, :4]
            cond, null = out.chunk(2)
            guided = null + guidance * (cond - null)
            latents = scheduler.step(guided, t, latents).prev_sample
            calls.append(dict(seen))
    for hook in hooks:
        hook.remove()
    return calls


@pytest.fixture(scope="module")
def pipe(make_pipeline):
    return make_pipeline()


@pytest.fixture(scope="module")
def stats(pipe, tmp_path_factory):
    return calibrate(pipe, tmp_path_factory.mktemp("stats"), **SMALL)


@pytest.fixture(scope="module")
def recorded(pipe, stats):
    return record(pipe.transformer, tuple(stats.manifest["plan"]["labels"]))


def all_sites(calls):
    return sorted({site for site, _ in calls[0]})


def test_every_site_of_every_block_is_recorded(stats, recorded):
    assert len(all_sites(recorded)) == 8
    for site in all_sites(recorded):
        low, high = stats.ranges(site)
        width = 256 if site.endswith("fc2") else 64
        assert low.shape == high.shape == (STEPS, width)
        assert low.dtype == high.dtype == torch.float32


def test_ranges_equal_an_independent_recording_exactly(stats, recorded):
    """The same batch on the same machine: minimum and maximum have no rounding of their own."""
    for index, call in enumerate(recorded):
        for (site, reader), rows in call.items():
            low, high = stats.ranges(site)
            flat = rows.flatten(0, 1)
            assert torch.equal(low[index], flat.amin(0)), (site, reader)
            assert torch.equal(high[index], flat.amax(0)), (site, reader)


@pytest.mark.parity("P21")
def test_both_halves_are_covered(stats, recorded):
    """P21: the statistics of [cond; null] are the elementwise extremes of the halves', and each half matters."""
    cond_decides = null_decides = 0
    for index, call in enumerate(recorded):
        for (site, _), rows in call.items():
            cond, null = (half.flatten(0, 1) for half in rows.chunk(2))
            low, high = stats.ranges(site)
            assert torch.equal(low[index], torch.minimum(cond.amin(0), null.amin(0)))
            assert torch.equal(high[index], torch.maximum(cond.amax(0), null.amax(0)))
            cond_decides += int((cond.amax(0) > null.amax(0)).sum())
            null_decides += int((null.amax(0) > cond.amax(0)).sum())
    assert min(cond_decides, null_decides) > 0


@pytest.mark.parity("P14")
def test_tensor_ranges_follow_from_channel_ranges(stats, recorded):
    """P14."""
    for index, call in enumerate(recorded):
        for (site, _), rows in call.items():
            low, high = stats.ranges(site)
            assert float(low[index].min()) == float(rows.min())
            assert float(high[index].max()) == float(rows.max())


@pytest.mark.parity("P22")
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_only_rounding(pipe, stats, recorded, tmp_path, micro_batch):
    """P22. Sums of up to 256 terms reorder: 256 * 6e-8 = 1.5e-5 relative in the worst case a GEMM, through the
    handful of GEMMs of 2 blocks; calls follow each other, so 1e-4 of the site's range in all."""
    split = calibrate(pipe, tmp_path, micro_batch=micro_batch, **SMALL)
    for site in all_sites(recorded):
        for ours, whole in zip(split.ranges(site), stats.ranges(site), strict=True):
            assert (ours - whole).abs().max() < 1e-4 * whole.abs().max()


def test_without_guidance_only_the_conditional_half_runs(pipe, tmp_path):
    batches = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args: batches.append(args[0].shape[0])
    )
    calibrate(pipe, tmp_path, steps=2, samples=3, guidance=1.0, quiet=True)
    hook.remove()
    assert batches == [3, 3]


def test_ddpm_calibrates_and_differs(pipe, stats, tmp_path):
    other = calibrate(pipe, tmp_path, sampler="ddpm", **SMALL)
    site = "transformer_blocks.0.qkv"
    assert other.manifest["sampler"] == "ddpm"
    # the first call sees the same noise at another timestep grid or the same; the later ones see added noise
    assert not torch.equal(other.ranges(site)[0][2], stats.ranges(site)[0][2])


def test_the_manifest_says_what_was_run(pipe, stats):
    manifest = stats.manifest
    assert manifest["plan"]["guidance"] == GUIDANCE
    assert manifest["plan"]["steps"] == STEPS
    assert manifest["architecture"] == "DiTTransformer2DModel"
    assert stats.calls == STEPS
    assert stats.timesteps == [666.0, 333.0, 0.0]  # DDIM leading: i * (1000 // 3), descending
    # classes that the pipeline can name, each once before any twice
    labels = manifest["plan"]["labels"]
    assert sorted(set(labels)) == [0, 1, 7]
    assert len(labels) == SAMPLES


def test_nothing_is_left_on_the_model(make_pipeline, inputs, tmp_path):
    pipe = make_pipeline(seed=2)
    model = pipe.transformer
    hashes = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = inputs(model)
    with torch.no_grad():
        before = model(**batch).sample
        calibrate(pipe, tmp_path / "stats", **SMALL)
        after = model(**batch).sample
    assert torch.equal(before, after)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert all(torch.equal(tensor, hashes[name]) for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "stats").iterdir()) == [
        "call_0000.safetensors",
        "call_0001.safetensors",
        "call_0002.safetensors",
        "manifest.json",
    ]


def test_the_pipelines_scheduler_is_not_touched(make_pipeline, tmp_path):
    pipe = make_pipeline()
    pipe.scheduler.set_timesteps(7)
    before = pipe.scheduler.timesteps.clone()
    calibrate(pipe, tmp_path, **SMALL)
    assert torch.equal(pipe.scheduler.timesteps, before)


def test_a_model_left_in_training_mode_gives_the_same_ranges(make_pipeline, stats, tmp_path):
    """In training mode diffusers drops labels at random, which would make a calibration irreproducible."""
    pipe = make_pipeline()
    pipe.transformer.train()
    again = calibrate(pipe, tmp_path, **SMALL)
    site = "transformer_blocks.1.fc2"
    for ours, reference in zip(again.ranges(site), stats.ranges(site), strict=True):
        assert torch.equal(ours, reference)
    assert pipe.transformer.training  # and it is handed back as it came


def test_a_model_that_is_not_finite_is_refused_and_unhooked(make_pipeline, tmp_path):
    pipe = make_pipeline(seed=4)
    model = pipe.transformer
    model.transformer_blocks[0].attn1.to_v.weight[3, 3] = torch.nan
    with pytest.raises(StatisticsError, match=r"transformer_blocks\.0\.attn1\.v: .*not finite"):
        calibrate(pipe, tmp_path, **SMALL)
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert not shard_path(tmp_path, 0).exists()


def test_an_infinite_activation_is_refused(make_pipeline, tmp_path):
    pipe = make_pipeline(seed=4)
    pipe.transformer.transformer_blocks[1].ff.net[0].proj.bias[0] = torch.inf
    with pytest.raises(StatisticsError, match=r"transformer_blocks\.1\.fc2: .*not finite"):
        calibrate(pipe, tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 4}, "another calls"),
        ({"samples": 5}, "another plan"),
        ({"guidance": 3.0}, "another plan"),
        ({"seed": 1}, "another plan"),
        ({"sampler": "ddpm"}, "another sampler"),
        ({"rows": 8}, "another rows"),
        ({"cfg_channels": 3}, "another plan"),
        ({"labels": (0, 1, 7, 7)}, "another plan"),
        ({"memory_budget": 2**40}, "another memory_budget"),
        ({"attention": False}, r"another attention \(True, now False\)"),
    ],
)
def test_another_plan_does_not_resume(pipe, stats, change, sentence):
    before = {path: path.read_bytes() for path in stats.folder.iterdir()}
    with pytest.raises(StatisticsError, match=sentence):
        calibrate(pipe, stats.folder, **{**SMALL, **change})
    assert {path: path.read_bytes() for path in stats.folder.iterdir()} == before


def test_another_model_does_not_resume(make_pipeline, stats):
    with pytest.raises(StatisticsError, match="another model_hash"):
        calibrate(make_pipeline(seed=8), stats.folder, **SMALL)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"sampler": "euler"}, "sampler must be one of ddim, ddpm"),
        ({"sampler": "flow"}, "flow does not fit a model whose scheduler is DDIMScheduler"),
        ({"rows": -1}, "rows must be 0"),
        ({"cfg_channels": 0}, "cfg_channels must be at least 1"),
        ({"cfg_channels": 5}, "cfg_channels must be at most 4, .* got 5"),
        ({"labels": ()}, "at least one class"),
        ({"labels": (0, 2)}, "no class 2"),
        ({"memory_budget": 2**20}, "1.0 MiB is too small: .* allow at least"),
    ],
)
def test_misuse_is_refused_before_a_folder_appears(pipe, tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        calibrate(pipe, tmp_path / "stats", **{**SMALL, **change})
    assert not (tmp_path / "stats").exists()


def test_an_unsupported_transformer_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"Linear has no family adapter; .*DiTTransformer2DModel"):
        calibrate(torch.nn.Linear(2, 2), tmp_path, **SMALL)


def test_a_finished_calibration_is_not_run_again(make_pipeline, stats):
    pipe = make_pipeline()
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    again = calibrate(pipe, stats.folder, **SMALL)
    assert again.manifest == stats.manifest


@pytest.mark.parity("P22")
@pytest.mark.parametrize("steps", [2, 6])
def test_memory_does_not_grow_with_the_number_of_calls(make_dit, tmp_path, monkeypatch, steps):
    """P22: when a call's ranges and rows are stored, those of the calls before are gone."""
    import sys

    module = sys.modules["ditq_converters.calibrate.run"]
    write, alive, counts = module.write_shard, [], []

    def spy(folder, call, ranges, rows):
        counts.append(sum(reference() is not None for reference in alive))
        alive.extend(weakref.ref(tensor) for pair in ranges.values() for tensor in pair)
        alive.extend(weakref.ref(tensor) for tensor in rows.values())
        write(folder, call, ranges, rows)

    monkeypatch.setattr(module, "write_shard", spy)
    calibrate(make_dit(), tmp_path, steps=steps, samples=1, quiet=True)
    assert counts == [0] * steps
    # of 8 sites minimum, maximum and rows; of Q, K and V in two blocks minimum and maximum
    assert len(alive) == steps * (8 * 3 + 2 * 3 * 2)
