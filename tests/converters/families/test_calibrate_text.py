"""Calibration of text-conditioned models: what they are told, statistics that cover both streams, exact methods."""

import pytest
import torch
from safetensors.torch import save_file

import ditq_runtime as ditq
from ditq_converters import Recipe, calibrate, convert
from ditq_converters.calibrate.recorder import Recorder
from ditq_converters.calibrate.rows import RowChoice
from ditq_runtime.calls.inputs import gather
from ditq_runtime.calls.pipeline import pipeline_of
from ditq_runtime.families import family_of

NAMES = ["pixart-alpha", "pixart-sigma", "sd3", "sd3.5", "flux-dev"]
PROMPTS, TOKENS = 3, 6
PLAN = {"steps": 3, "samples": 2, "quiet": True, "rows": 8, "height": 64, "width": 64}


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
    visits = []
    with Recorder(
        {"transformer": (model, family)}, RowChoice(0, 0, 0), 0, 0, True, visits.append
    ) as recorder:
        run(model, inputs)
        recorder.finish()
    low, high = visits[0].ranges["transformer_blocks.0.o_proj"]
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
    fused = run(packed, inputs)
    error = float((fused - truth).norm() / truth.norm())
    bound = 0.34 if recipe.weights == "w4p" else 0.06 if recipe.activations == "static" else 0.03
    assert 0 < error < bound
    ditq.configure(packed, fuse=False)
    assert torch.equal(run(packed, inputs), fused)


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
    times = stats.timesteps  # in the model's own units
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
def test_a_transformer_alone_is_called_as_its_pipeline_calls_it(
    calibrated, make_case, embeddings, name
):
    """The kept calls: prompts in the order of the file, the empty one beside each, as stock diffusers passes them."""
    model, _, stats = calibrated(name)
    found, calls = embeddings(model), list(stats.replay())
    assert len(calls) == 2 * 3
    assert [call.timestep for call in calls[:3]] == stats.timesteps
    told = calls[0].kwargs
    text = told["encoder_hidden_states"]
    if name == "flux-dev":  # told its guidance, so there is no second half
        assert told["guidance"].tolist() == [2.0]
        assert stats.timesteps[0] == 1.0
        prompts = [
            next(
                i
                for i in range(PROMPTS)
                if torch.equal(c.kwargs["encoder_hidden_states"], found["prompt_embeds"][i : i + 1])
            )
            for c in calls
        ]
    else:
        assert torch.equal(text[:1], found["negative_prompt_embeds"])
        assert stats.timesteps[0] > 600
        prompts = [
            next(
                i
                for i in range(PROMPTS)
                if torch.equal(
                    c.kwargs["encoder_hidden_states"][1:], found["prompt_embeds"][i : i + 1]
                )
            )
            for c in calls
        ]
    assert len(set(prompts)) == 2  # two samples of three prompts
    if name.startswith("pixart"):
        assert torch.equal(
            told["encoder_attention_mask"][1], found["prompt_attention_mask"][prompts[0]]
        )
        additional = told["added_cond_kwargs"]
        assert (additional["resolution"] is None) == (name == "pixart-sigma")
    else:
        pooled = found["pooled_prompt_embeds"][prompts[0]]
        assert torch.equal(told["pooled_projections"][-1], pooled)


def test_embeddings_that_do_not_fit_are_refused(make_case, tmp_path, embeddings):
    model, _ = make_case("sd3")
    pipe, found, path = pipeline_of(model), embeddings(model), tmp_path / "p.safetensors"

    def refuse(sentence, **changes):
        save_file({k: v for k, v in {**found, **changes}.items() if v is not None}, path)
        with pytest.raises(ValueError, match=sentence):
            gather("test", pipe, prompts=path)

    refuse(r"\[2, 3\] prompts; they must agree", prompt_embeds=randn(2, 6, 32, seed=0))
    refuse(
        r"negative_prompt_embeds must be \[3, ...\], got \[2",
        negative_prompt_embeds=randn(2, 6, 32, seed=0),
    )
    refuse("takes no argument 'pooled_embeds'", pooled_embeds=randn(3, 48, seed=0))
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        gather("test", pipe, prompts=path)


def test_what_cannot_be_is_refused_before_anything_is_written(make_case, tmp_path):
    model, _ = make_case("sd3")

    def refuse(sentence, **options):
        with pytest.raises(ValueError, match=sentence):
            calibrate(model, tmp_path / "never made", quiet=True, **options)

    refuse("StableDiffusion3Pipeline needs inputs: prompts, or the arguments of its calls")
    refuse("labels are classes, and StableDiffusion3Pipeline has none", labels=[3])
    refuse("prompts must hold at least one", prompts=[])
    (tmp_path / "empty.txt").write_text("\n \n")
    refuse("holds no prompt; write one per line", prompts=tmp_path / "empty.txt")
    refuse("trained with flow matching; take flow", prompts=["a"], sampler="ddim")
    assert not (tmp_path / "never made").exists()
