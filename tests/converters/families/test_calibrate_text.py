"""Calibration of text-conditioned models: what they are told, statistics that cover both streams, exact methods."""

import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from ditq_converters import Recipe, StatisticsError, calibrate, convert
from ditq_converters.calibrate.captions import Captions, read_captions
from ditq_converters.calibrate.hosts import Batch, host_of
from ditq_converters.calibrate.recorder import Recorder
from ditq_converters.calibrate.rows import RowPlan
from ditq_converters.calibrate.samplers import make_scheduler, set_timesteps
from ditq_runtime.families import family_of

NAMES = ["pixart-alpha", "pixart-sigma", "sd3", "sd3.5", "flux-dev"]
PROMPTS, TOKENS = 3, 6
PLAN = {"steps": 3, "samples": 2, "quiet": True, "rows": 8}


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def calibrated(make_case, embeddings, tmp_path_factory):
    """Name -> (model, its embeddings file, its statistics)."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model, _ = make_case(name)
            save_file(embeddings(model), folder / "prompts.safetensors")
            stats = calibrate(
                model,
                folder / "stats",
                guidance=2.0,
                prompts=folder / "prompts.safetensors",
                **PLAN,
            )
            made[name] = model, folder / "prompts.safetensors", stats
        return made[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_every_site_has_finite_ranges_and_rows(calibrated, name):
    model, _, stats = calibrated(name)
    for block, table in family_of(type(model).__name__).block_tables(model).items():
        for site in table.sites:
            width = model.get_submodule(f"{block}.{site.consumers[0]}").in_features
            low, high = stats.ranges(f"{block}.{site.name}")
            assert low.shape == high.shape == (3, width)
            assert bool((low <= high).all())
            rows, calls = stats.rows(f"{block}.{site.name}")
            assert rows.shape == (3, 8, width)
            assert calls == (0, 1, 2)
            assert bool((rows >= low[:, None]).all() and (rows <= high[:, None]).all())


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_ranges_of_a_joint_site_cover_both_streams(make_case, run, name):
    """Own hooks on both output projections: the site is the union, and each stream decides some channels."""
    model, inputs = make_case(name)
    family, seen, hooks = family_of(type(model).__name__), {}, []
    for consumer in ("attn.to_out.0", "attn.to_add_out"):
        module = model.transformer_blocks[0].get_submodule(consumer)
        keep = lambda _, args, consumer=consumer: seen.update({consumer: args[0].flatten(0, 1)})  # noqa: E731
        hooks.append(module.register_forward_pre_hook(keep))
    recorder = Recorder(model, family, RowPlan(0, (), 1, False))
    with recorder:
        run(model, inputs)
    low, high = recorder.ranges()["transformer_blocks.0.o_proj"]
    image, text = seen.values()
    assert torch.equal(high, torch.maximum(image.amax(0), text.amax(0)))
    assert torch.equal(low, torch.minimum(image.amin(0), text.amin(0)))
    assert 0 < int((image.amax(0) > text.amax(0)).sum()) < len(high)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("smoothquant", "w8", "token"),
        Recipe("smoothquant", "w8", "static"),
        Recipe("htg", "w8", "token", num_groups=2),
        Recipe("ptq4dit", "w8", "static"),
        Recipe("ditas", "w4p", "token", group_size=32, lora_rank=4),
        Recipe("htg", "w4p", "static", 32, num_groups=2, bias_correction=True),
    ],
    ids=lambda recipe: f"{recipe.method}-{recipe.activations}",
)
def test_every_method_runs_in_integers_and_stays_close(calibrated, run, make_case, name, recipe):
    """Errors of 8 bits are a percent or two on a random model, of 4 bits 17 times that; a wrong fold is of order 1."""
    model, _, stats = calibrated(name)
    _, inputs = make_case(name)
    packed = convert(model, recipe, stats, quiet=True)
    truth = run(model, inputs)
    error = float((run(packed, inputs) - truth).norm() / truth.norm())
    bound = 0.34 if recipe.weights == "w4p" else 0.06 if recipe.activations == "static" else 0.03
    assert 0 < error < bound


@pytest.mark.parametrize("name", ["pixart-sigma", "sd3.5", "flux-dev"])
def test_timestep_groups_survive_disk_and_know_the_models_unit(
    calibrated, run, make_case, tmp_path, name
):
    model, _, stats = calibrated(name)
    _, inputs = make_case(name)
    packed = convert(model, Recipe("htg", num_groups=2), stats, tmp_path / "out", quiet=True)
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(run(loaded, inputs), run(packed, inputs))
    block = loaded.transformer_blocks[0]
    scale = 1e-3 if name == "flux-dev" else 1.0
    times = [scale * t for t in stats.timesteps]
    assert min(times) < float(block.timestep_groups.bounds) < max(times)
    groups = [float(t) > float(block.timestep_groups.bounds) for t in inputs["timestep"]]
    assert 0 < sum(groups) < 4
    run(loaded, inputs)
    assert block.timestep_groups(inputs["timestep"]).tolist() == [int(g) for g in groups]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_one_compiled_graph_serves_all_steps_and_groups(calibrated, run, make_case):
    """Also a batch whose samples are in different groups; the model's forward notes the timestep for its blocks."""
    model, _, stats = calibrated("pixart-sigma")
    _, inputs = make_case("pixart-sigma")
    packed = convert(model, Recipe("htg", num_groups=2), stats, quiet=True)
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(packed, backend=backend, fullgraph=True)
    groups, largest = set(), inputs["timestep"].max()
    for times in (inputs["timestep"], inputs["timestep"] * 0 + largest, inputs["timestep"] * 0):
        told = {**inputs, "timestep": times}
        assert torch.equal(run(compiled, told), run(packed, told))
        groups.add(tuple(packed.transformer_blocks[0].timestep_groups(times).tolist()))
    torch.compiler.reset()
    assert len(groups) == 3
    assert len(graphs) == 1


def test_beyond_the_values_flux_keeps_what_the_method_leaves(calibrated):
    """HTG and PTQ4DiT leave the GELU half alone; SmoothQuant smooths it on the fly, the attention half through V."""
    model, _, stats = calibrated("flux-dev")
    width = model.inner_dim
    smooth = convert(model, Recipe("smoothquant"), stats, quiet=True)
    inverse = smooth.single_transformer_blocks[0].proj_out.site.smooth_inv
    assert bool((inverse[:width] == 1).all())
    assert bool((inverse[width:] != 1).any())
    for method in ("htg", "ptq4dit"):
        packed = convert(model, Recipe(method), stats, quiet=True)
        assert packed.single_transformer_blocks[0].proj_out.site.smooth_inv is None


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_told_what_its_pipeline_tells_it(make_case, name, embeddings):
    """The rows of a guided batch: prompts by id, the empty prompt last, floats in the model's dtype."""
    model, _ = make_case(name)
    found = embeddings(model)
    host = host_of(model)
    captions = read_captions_of(found, model)
    assert captions.count == PROMPTS
    assert captions.has_null
    seen = {}
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs, hidden_states=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )  # fmt: skip
    c, h, w = host.latent_shape(model)
    ids = torch.tensor([2, 0, PROMPTS])
    times = torch.tensor([500.0]).expand(3)
    with torch.no_grad():
        out = host.call(model, Batch(randn(3, c, h, w, seed=5), times, ids, captions, 3.5))
    assert out.shape[0] == 3
    assert out.shape[2:] == (h, w)
    expected = torch.cat([found["prompt_embeds"][[2, 0]], found["negative_prompt_embeds"]])
    assert torch.equal(seen["encoder_hidden_states"], expected)
    if name.startswith("pixart"):
        assert torch.equal(seen["encoder_attention_mask"][1], found["prompt_attention_mask"][0])
    else:
        assert torch.equal(seen["pooled_projections"][2:], found["negative_pooled_prompt_embeds"])
    if name == "flux-dev":
        assert seen["timestep"].tolist() == [0.5] * 3
        assert seen["guidance"].tolist() == [3.5] * 3
    else:
        assert seen["timestep"].tolist() == [500.0] * 3


def read_captions_of(found, model, tmp=None):
    from ditq_converters.calibrate.captions import _captions

    return _captions(found, host_of(model).captions(model), "test")


def test_flux_latents_are_packed_as_its_pipeline_packs_them(make_case, embeddings):
    """Against index arithmetic: token (i, j) holds the 2 x 2 patch at (2 i, 2 j), channel major; ids say so."""
    model, _ = make_case("flux-dev")
    c, h, w = host_of(model).latent_shape(model)
    latents, seen = randn(1, c, h, w, seed=1), {}
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    captions = read_captions_of(embeddings(model), model)
    batch = Batch(latents, torch.tensor([500.0]), torch.tensor([0]), captions, 1.0)
    with torch.no_grad():
        out = host_of(model).call(model, batch)
    i, j, columns = 5, 9, w // 2
    token = seen["hidden_states"][0, i * columns + j]
    for channel in range(c):
        for dy in (0, 1):
            for dx in (0, 1):
                value = latents[0, channel, 2 * i + dy, 2 * j + dx]
                assert token[4 * channel + 2 * dy + dx] == value
    assert seen["img_ids"][i * columns + j].tolist() == [0, i, j]
    with torch.no_grad():
        tokens = model(**seen).sample
    assert out[0, 1, 2 * i + 1, 2 * j] == tokens[0, i * columns + j, 4 + 2]


def test_the_dynamic_shift_is_the_pipelines(make_case):
    """Flux-dev's own scheduler at 1024 tokens: mu = 0.5 + 0.65 * (1024 - 256) / (4096 - 256) = 0.63."""
    model, _ = make_case("flux-dev")
    own = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    ours = make_scheduler(SimpleNamespace(scheduler=own), "flow", model)
    assert math.isclose(ours.config.shift, math.exp(0.63), rel_tol=1e-12)
    set_timesteps(ours, 4)
    sigma = torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64)
    shifted = math.exp(0.63) / (math.exp(0.63) + (1 / sigma - 1))
    # the last grid point is that of 1/1000, shifted when the scheduler was made and again with the grid
    torch.testing.assert_close(float(ours.sigmas[0]), float(shifted[0]), rtol=0, atol=1e-6)
    middle = torch.linspace(1000, float(shifted[-1]) * 1000, 4, dtype=torch.float64)[1] / 1000
    expected = math.exp(0.63) / (math.exp(0.63) + (1 / middle - 1))
    torch.testing.assert_close(float(ours.sigmas[1]), float(expected), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="of a known model"):
        make_scheduler(SimpleNamespace(scheduler=own), "flow")


def test_a_flow_model_without_a_pipeline_is_not_calibrated_with_ddim(make_case, tmp_path):
    model, _ = make_case("sd3")
    with pytest.raises(ValueError, match=r"sampler ddim does not fit .*; use flow or t_max"):
        calibrate(model, tmp_path, sampler="ddim", prompts=["a"], quiet=True)


class Encoders:
    """A pipeline's face: `encode_prompt` with diffusers' parameters and order of results."""

    text_encoder, device = object(), torch.device("cpu")

    def __init__(self, transformer, scheduler):
        self.transformer, self.scheduler = transformer, scheduler

    def _embed(self, prompt, name, seed=0):
        width = host_of(self.transformer).captions(self.transformer)[name]
        shape = (1, TOKENS, width) if name == "prompt_embeds" else (1, width)
        return randn(*shape, seed=seed + sum(map(ord, prompt)))


class PixArtEncoders(Encoders):
    def encode_prompt(self, prompt, do_classifier_free_guidance=True, negative_prompt="", num_images_per_prompt=1,
                      device=None):  # fmt: skip
        mask = torch.ones(1, TOKENS, dtype=torch.long)
        return self._embed(prompt, "prompt_embeds"), mask, self._embed("", "prompt_embeds"), mask


class SD3Encoders(Encoders):
    def encode_prompt(self, prompt, prompt_2, prompt_3, device=None, num_images_per_prompt=1,
                      do_classifier_free_guidance=True):  # fmt: skip
        assert prompt == prompt_2 == prompt_3
        texts = (prompt, "")
        embeds = [self._embed(t, "prompt_embeds") for t in texts]
        return (*embeds, *(self._embed(t, "pooled_prompt_embeds", 7) for t in texts))


class FluxEncoders(Encoders):
    def encode_prompt(self, prompt, prompt_2=None, device=None):
        pooled = self._embed(prompt, "pooled_prompt_embeds", 7)
        return self._embed(prompt, "prompt_embeds"), pooled, torch.zeros(TOKENS, 3)


@pytest.mark.parametrize(
    ("name", "pipeline", "scheduler"),
    [
        ("pixart-sigma", PixArtEncoders, diffusers.DPMSolverMultistepScheduler()),
        ("sd3", SD3Encoders, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
        (
            "flux-dev",
            FluxEncoders,
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        ),
    ],
)
def test_prompts_are_encoded_by_the_pipeline(make_case, tmp_path, name, pipeline, scheduler):
    """A list, a text file and the same embeddings in a file are one calibration."""
    model, _ = make_case(name)
    pipe = pipeline(model, scheduler)
    prompts = ["a cat", "two dogs"]
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two dogs \n", encoding="utf-8")
    widths = host_of(model).captions(model)
    kind = type(model).__name__
    listed = read_captions(prompts, pipe, kind, widths)
    filed = read_captions(tmp_path / "prompts.txt", pipe, kind, widths)
    assert listed.digest == filed.digest
    assert isinstance(listed, Captions)
    assert torch.equal(
        listed.tensors["prompt_embeds"][1:2], pipe._embed("two dogs", "prompt_embeds")
    )
    stats = calibrate(
        pipe, tmp_path / "stats", prompts=prompts, guidance=2.0, steps=2, samples=2, quiet=True
    )
    assert stats.manifest["plan"]["captions"] == listed.digest
    assert stats.manifest["plan"]["distilled"] == (name == "flux-dev")
    with pytest.raises(StatisticsError, match="another plan"):
        calibrate(
            pipe,
            tmp_path / "stats",
            prompts=["a cow"],
            guidance=2.0,
            steps=2,
            samples=2,
            quiet=True,
        )


def refuse(model, sentence, **options):
    with pytest.raises(ValueError, match=sentence):
        calibrate(model, "never made", quiet=True, **options)


def test_what_cannot_be_is_refused_before_anything_is_written(make_case, tmp_path, embeddings):
    model, _ = make_case("sd3")
    found = embeddings(model)
    path = tmp_path / "p.safetensors"

    def damaged(**changes):
        save_file({k: v for k, v in {**found, **changes}.items() if v is not None}, path)
        return {"prompts": path}

    refuse(model, "is conditioned on text; pass prompts")
    refuse(model, "need a pipeline with its text encoders", prompts=["a cat"])
    refuse(model, "pooled_prompt_embeds missing", **damaged(pooled_prompt_embeds=None))
    refuse(
        model, r"must end in 32 for this model", **damaged(prompt_embeds=randn(3, 6, 31, seed=0))
    )
    refuse(
        model,
        r"\[2, 3\] prompts; they must agree",
        **damaged(prompt_embeds=randn(2, 6, 32, seed=0)),
    )
    refuse(
        model, "pad both to one length", **damaged(negative_prompt_embeds=randn(1, 5, 32, seed=0))
    )
    refuse(
        model,
        "needs the negative_ embeddings",
        guidance=2.0,
        **damaged(negative_prompt_embeds=None),
    )
    refuse(model, "labels are classes", labels=[3], **damaged())
    refuse(model, "prompts must hold at least one", prompts=[])
    (tmp_path / "empty.txt").write_text("\n \n")
    refuse(model, "holds no prompt; write one per line", prompts=tmp_path / "empty.txt")
    dit, _ = make_case("dit")
    refuse(dit, "is conditioned on classes; pass labels", prompts=["a cat"])
    assert not (tmp_path / "never made").exists()
