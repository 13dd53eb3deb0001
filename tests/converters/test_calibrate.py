"""Calibration: ranges as an independent recording has them, and nothing left behind on pipeline, model or machine."""

import json
import sys

import pytest
import torch
from diffusers import DDIMScheduler

from ditq_converters import CalibrationStats, Recipe, StatisticsError, calibrate, convert
from ditq_converters.calibrate.shards import Handles, shard_folder
from ditq_runtime.calls.seeds import generator

CONSUMERS = {
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "o_proj": ("attn1.to_out.0",),
    "fc1": ("ff.net.0.proj",),
    "fc2": ("ff.net.2",),
}
STEPS, LABELS, GUIDANCE = 3, (0, 7, 1, 0), 2.0
SMALL = {"steps": STEPS, "labels": LABELS, "guidance": GUIDANCE, "quiet": True}


def record(model):
    """Own loop, own hooks, one batch: per call, (site, reader) -> rows [2S, tokens, K], cond half first."""
    seen, calls, hooks = {}, [], []
    for index, block in enumerate(model.transformer_blocks):
        for site, names in CONSUMERS.items():
            for name in names:
                key = (f"transformer_blocks.{index}.{site}", name)

                def keep(_, args, key=key):
                    seen[key] = args[0].clone()

                hooks.append(block.get_submodule(name).register_forward_pre_hook(keep))
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    noise = [torch.randn(4, 8, 8, generator=generator(0, n)) for n in range(len(LABELS))]
    latents = torch.stack(noise)
    classes = torch.tensor([*LABELS, *[1000] * len(LABELS)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen.clear()
            double = torch.cat([latents, latents])
            out = model(double, timestep=t.expand(len(double)), class_labels=classes).sample[:, :4]
            cond, null = out.chunk(2)
            latents = scheduler.step(null + GUIDANCE * (cond - null), t, latents).prev_sample
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
    return record(pipe.transformer)


def test_ranges_equal_an_independent_recording_exactly(stats, recorded):
    """The same batch on the same machine: minimum and maximum have no rounding of their own."""
    assert len({site for site, _ in recorded[0]}) == 8
    for index, call in enumerate(recorded):
        for (site, reader), rows in call.items():
            low, high = stats.ranges(site)
            assert low.dtype == high.dtype == torch.float32
            assert low.shape == (STEPS, 256 if site.endswith("fc2") else 64)
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
@pytest.mark.parametrize("batch", [1, 3])
def test_how_samples_are_put_into_calls_changes_only_rounding(
    pipe, stats, recorded, tmp_path, batch
):
    """P22. Sums of up to 256 terms reorder: 256 * 6e-8 = 1.5e-5 relative in the worst case a GEMM, through the
    handful of GEMMs of 2 blocks; calls follow each other, so 1e-4 of the site's range in all."""
    split = calibrate(pipe, tmp_path, batch=batch, **SMALL)
    assert len(split.manifest["inputs"]) == -(-len(LABELS) // batch)
    for site in {site for site, _ in recorded[0]}:
        for ours, whole in zip(split.ranges(site), stats.ranges(site), strict=True):
            assert (ours - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parity("P20")
def test_the_first_call_is_at_the_highest_noise(pipe, tmp_path):
    """P20: what the 1-step calibration reads, for schedulers that run up, down and from somewhere."""
    for number, sampler in enumerate(("ddim", "ddpm", "dpmsolver++")):
        stats = calibrate(pipe, tmp_path / str(number), sampler=sampler, **SMALL)
        assert stats.timesteps == sorted(stats.timesteps, reverse=True)
        assert stats.calls == STEPS
    assert stats.timesteps[0] == 999


def test_a_modulation_keeps_what_it_reads(make_pipeline, tmp_path):
    """Of 8 rows a call, all of them: SiLU(t + y), the very values of an own hook."""
    pipe, seen = make_pipeline(), []
    name = "transformer_blocks.1.norm1.linear"
    hook = pipe.transformer.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    stats = calibrate(pipe, tmp_path, **SMALL)
    hook.remove()
    rows, calls = stats.modulation(name)
    assert calls == tuple(call for call in range(STEPS) for _ in range(8))
    for call, mine in enumerate(seen):
        found = rows[8 * call : 8 * call + 8]
        assert torch.equal(found.sort(0).values, mine.sort(0).values)
    assert stats.modulation("proj_out_1")[0].shape == (3 * 8, 64)  # of the last norm


def test_kept_calls_give_the_outputs_of_the_run(make_pipeline, tmp_path):
    pipe, outputs = make_pipeline(), {}
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: outputs.update({float(kwargs["timestep"][0]): out[0]}),
        with_kwargs=True,
    )
    stats = calibrate(pipe, tmp_path, **SMALL)
    hook.remove()
    calls = list(CalibrationStats.open(tmp_path).replay())
    assert [call.timestep for call in calls] == stats.timesteps  # 3 calls, at most 16 are kept
    for call in calls:
        assert torch.equal(call.replay(pipe.transformer), outputs[call.timestep])


@pytest.mark.parity("P22")
def test_memory_does_not_grow_with_the_number_of_calls(make_pipeline, stats, tmp_path, monkeypatch):
    """P22: what a run holds goes to a file when it is more than SPILL; here, after every timestep."""
    import sys

    monkeypatch.setattr(sys.modules["ditq_converters.calibrate.shards"], "SPILL", 1)
    spilled = calibrate(make_pipeline(), tmp_path, **SMALL)
    files = sorted(path.name for path in shard_folder(tmp_path, 0).glob("0*.safetensors"))
    assert files == [f"{call:04d}.safetensors" for call in range(STEPS)]
    for path in (stats.folder / "merged").rglob("*.*"):
        assert (tmp_path / path.relative_to(stats.folder)).read_bytes() == path.read_bytes()
    assert [c.timestep for c in spilled.replay()] == stats.timesteps


def test_the_kept_calls_are_bounded(make_pipeline, tmp_path):
    stats = calibrate(
        make_pipeline(), tmp_path, steps=20, labels=(0, 1), guidance=1.0, rows=0, quiet=True
    )
    assert len(list(stats.replay())) == 16


def test_without_guidance_only_the_conditional_half_runs(pipe, tmp_path):
    batches = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args: batches.append(args[0].shape[0])
    )
    calibrate(pipe, tmp_path, steps=2, samples=3, guidance=1.0, quiet=True)
    hook.remove()
    assert batches == [3, 3]


def test_the_manifest_says_what_was_run(stats):
    (model,) = stats.manifest["models"].values()
    assert model["architecture"] == "DiTTransformer2DModel"
    assert (stats.manifest["sampler"], len(stats.manifest["inputs"])) == ("DDIMScheduler", 1)
    assert stats.timesteps == [666.0, 333.0, 0.0]  # DDIM leading: i * (1000 // 3), descending
    log = (stats.folder / "calibrate.log").read_text()
    assert "input 0 done, 3 calls; 1 of 1" in log
    assert "ETA 0 s" in log


def test_nothing_is_left_on_pipeline_and_machine(make_pipeline, inputs, tmp_path):
    pipe = make_pipeline(seed=2)
    model, decode, scheduler = pipe.transformer, pipe.vae.decode, pipe.scheduler
    scheduler.set_timesteps(7)
    times, model.training = scheduler.timesteps.clone(), True
    pipe.vae.register_forward_pre_hook(lambda *_: pytest.fail("the VAE ran"))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    calibrate(pipe, tmp_path / "stats", sampler="ddpm", **SMALL)
    assert torch.equal(torch.rand(1), expected)  # the global random state did not move
    assert model.training
    assert (pipe.scheduler, pipe.vae.decode) == (scheduler, decode)
    assert torch.equal(pipe.scheduler.timesteps, times)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "stats").iterdir()) == [
        "calibrate.log",
        "inputs",
        "manifest.json",
        "merged",
    ]


def test_a_model_that_is_not_finite_is_refused_and_unhooked(make_pipeline, tmp_path):
    pipe = make_pipeline(seed=4)
    model = pipe.transformer
    model.transformer_blocks[0].attn1.to_v.weight[3, 3] = torch.nan
    with pytest.raises(StatisticsError, match=r"transformer_blocks\.0\.attn1\.v: .*not finite"):
        calibrate(pipe, tmp_path, **SMALL)
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert not shard_folder(tmp_path, 0).exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 4}, "other inputs"),
        ({"labels": (0, 7, 1, 1)}, "other inputs"),
        ({"guidance": 3.0}, "other inputs"),
        ({"seed": 1}, "other seed"),
        ({"sampler": "ddpm"}, "other sampler"),
        ({"rows": 8}, r"other rows \(64, now 8\)"),
        ({"attention": False}, r"other attention \(True, now False\)"),
    ],
)
def test_other_arguments_do_not_resume(pipe, stats, change, sentence):
    before = {path: path.read_bytes() for path in stats.folder.rglob("*") if path.is_file()}
    with pytest.raises(StatisticsError, match=sentence):
        calibrate(pipe, stats.folder, **{**SMALL, **change})
    assert {p: p.read_bytes() for p in stats.folder.rglob("*") if p.is_file()} == before


def test_another_model_does_not_resume(make_pipeline, stats):
    with pytest.raises(StatisticsError, match="other models"):
        calibrate(make_pipeline(seed=8), stats.folder, **SMALL)


def test_shards_of_another_model_do_not_pass_under_a_new_manifest(make_pipeline, tmp_path):
    calibrate(make_pipeline(), tmp_path, **SMALL)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StatisticsError, match=r"inputs/0000: was made of another model; delete it"):
        calibrate(make_pipeline(seed=8), tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"labels": None, "samples": 0}, "samples must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"sampler": "heun"}, "--sampler must be one of ddim, ddpm"),
        ({"sampler": "flow"}, "was trained with diffusion; take ddim"),
        ({"rows": -1}, "rows must be 0"),
        ({"labels": ()}, "at least one class"),
        ({"labels": (0, 2)}, "no class 2"),
        ({"stpes": 3}, "DiTPipeline takes no argument 'stpes'; its arguments are class_labels"),
        ({"prompts": ["a"]}, "give one of prompts and labels"),
        ({"labels": None, "prompts": ["a"]}, "DiTPipeline draws classes, not text; pass labels"),
        ({"labels": None, "inputs": []}, "at least one call"),
        ({"memory_budget": 2**20}, "1.0 MiB is too small: .* allow at least"),
    ],
)
def test_misuse_is_refused_before_a_folder_appears(pipe, tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        calibrate(pipe, tmp_path / "stats", **{**SMALL, **change})
    assert not (tmp_path / "stats").exists()


def test_a_folder_that_is_something_else_is_refused(pipe, tmp_path):
    pipe.transformer.save_pretrained(tmp_path / "model")
    before = sorted((tmp_path / "model").iterdir())
    with pytest.raises(StatisticsError, match=r"model: holds something else \(config.json"):
        calibrate(pipe, tmp_path / "model", **SMALL)
    assert sorted((tmp_path / "model").iterdir()) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(StatisticsError, match="is a file"):
        calibrate(pipe, tmp_path / "file", **SMALL)


def test_an_unsupported_transformer_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"Linear has no family adapter; .*DiTTransformer2DModel"):
        calibrate(torch.nn.Linear(2, 2), tmp_path, **SMALL)


def test_a_finished_calibration_is_not_run_again(make_pipeline, stats):
    pipe = make_pipeline()
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    again = calibrate(pipe, stats.folder, **SMALL)
    assert again.manifest == stats.manifest


def test_more_inputs_are_added_later(make_pipeline, tmp_path):
    """The first input is not run again, and the ranges are those of both."""
    pipe, ran = make_pipeline(), []
    call = {"num_inference_steps": 2, "guidance_scale": 1.0}
    entries = [{"class_labels": [0, 1], **call}, {"class_labels": [7], **call}]
    first = calibrate(pipe, tmp_path, entries[:1], quiet=True, rows=8)
    before = first.ranges("transformer_blocks.0.qkv")
    pipe.transformer.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    both = calibrate(pipe, tmp_path, entries, quiet=True, rows=8)
    assert ran == [1, 1]
    low, high = both.ranges("transformer_blocks.0.qkv")
    assert bool((low <= before[0]).all() and (high >= before[1]).all())
    assert not torch.equal(high, before[1])
    assert both.rows("transformer_blocks.0.qkv")[0].shape == (2, 8, 64)
    with pytest.raises(StatisticsError, match="other inputs"):
        calibrate(pipe, tmp_path, entries[1:], quiet=True, rows=8)


def test_an_own_loop_calibrates_a_transformer(make_dit, tmp_path):
    """Timesteps as they come, one pass: the noisiest first all the same, equal ones together."""
    model, given = make_dit(), []

    def loop(model):
        for t in (900.0, 900.0, 20.0):
            x = torch.randn(2, 4, 8, 8)
            given.append(x)
            model(x, timestep=torch.tensor([t, t]), class_labels=torch.tensor([3, 5]))

    stats = calibrate(model, tmp_path / "loop", run=loop, quiet=True)
    assert stats.timesteps == [900.0, 20.0]
    again = calibrate(model, tmp_path / "again", run=loop, quiet=True)
    assert torch.equal(given[0], given[3])  # noise of an own loop is seeded
    for a, b in zip(
        stats.ranges("transformer_blocks.0.fc1"),
        again.ranges("transformer_blocks.0.fc1"),
        strict=True,
    ):
        assert torch.equal(a, b)
    with pytest.raises(StatisticsError, match="no transformer ran; is it an input"):
        calibrate(model, tmp_path / "idle", run=lambda: None, quiet=True)


def test_a_run_per_entry_is_given_its_arguments(make_dit, tmp_path):
    model, told = make_dit(), []

    def once(model, label, t):
        told.append((label, t))
        model(
            torch.zeros(1, 4, 8, 8), timestep=torch.tensor([t]), class_labels=torch.tensor([label])
        )

    entries = [{"label": 3, "t": 500}, {"label": 4, "t": 100}]
    stats = calibrate(model, tmp_path, entries, run=once, quiet=True)
    assert told == [(3, 500), (4, 100)]
    assert len(stats.manifest["inputs"]) == 2
    assert json.loads((shard_folder(tmp_path, 1) / "shard.json").read_text())["visits"] == [
        {"component": "transformer", "timestep": 100.0}
    ]


def test_merging_opens_a_file_for_all_sites_at_once(pipe, tmp_path, monkeypatch):
    """However little may be open: per timestep and input once for ranges, for rows and for modulation's inputs."""
    made = calibrate(pipe, tmp_path / "stats", batch=1, **SMALL)
    shards = list(made.shards())
    assert len(shards) == len(LABELS)
    opened = []

    class OneFile(Handles):
        def get(self, path):
            if path not in self._open:
                opened.append(path)
            return super().get(path)

    module = sys.modules[
        "ditq_converters.calibrate.merge"
    ]  # the package's name is also a function's
    monkeypatch.setattr(module, "Handles", lambda: OneFile(0))
    before = files_of(tmp_path / "stats" / "merged")
    module.merge(tmp_path / "stats", shards, [], made.components, made.manifest["settings"]["rows"])
    after = files_of(tmp_path / "stats" / "merged")
    assert {**after, "inputs.json": b""} == {**before, "inputs.json": b""}
    assert len(LABELS) * STEPS <= len(opened) <= 3 * len(LABELS) * STEPS


def files_of(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()
    }


def test_a_method_over_time_says_that_schedules_differ(make_pipeline, tmp_path, capfd):
    """3 steps at 666, 333 and 0 and 2 at 500 and 0: four timesteps, of which the longest run has three."""
    pipe = make_pipeline()
    entries = [
        {"class_labels": [1], "num_inference_steps": n, "guidance_scale": 1.0} for n in (3, 2)
    ]
    for count, said in ((2, True), (1, False)):
        stats = calibrate(pipe, tmp_path / str(count), entries[:count], quiet=True)
        assert stats.differing_timesteps == (4 if said else 0)
        for recipe, over_time in (
            (Recipe("htg", num_groups=2), True),
            (Recipe("smoothquant"), False),
        ):
            capfd.readouterr()
            convert(pipe, recipe, stats)
            told = "htg orders their 4 timesteps by noise and takes neighbours together, as 3"
            assert (told in capfd.readouterr().err) is (said and over_time)
