"""What diffusers' own model and pipeline tests ask of any transformer and pipeline, of quantized PixArt, SD3 and Flux.

For DiT see tests/runtime/test_host_matrix.py.
"""

import math

import pytest
import torch
from diffusers import DiffusionPipeline

import ditq_runtime as ditq

# diffusers' DPM-Solver copies a tensor by np.array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CASES = {  # PixArt with folds and timestep groups, the others as conversion without data makes them
    "pixart-sigma": ("htg", "static"),
    "sd3": ("linear", "token"),
    "flux": ("linear", "token"),
}


@pytest.fixture(scope="module")
def case(packed_folder, transformer_inputs):
    """Family -> (folder, packed pipeline, keyword arguments of one forward of its transformer, its images)."""
    made = {}

    def get(name):
        if name not in made:
            folder = packed_folder(name, *CASES[name])
            pipe = DiffusionPipeline.from_pretrained(folder)
            pipe.set_progress_bar_config(disable=True)
            calls, images = transformer_inputs(pipe)
            made[name] = folder, pipe, calls[-1], images
        return made[name]

    return get


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def relative(got, expected):
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def cast(inputs, dtype):
    """Inputs in another dtype; timesteps stay."""
    return {
        key: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "timestep"
        else value
        for key, value in inputs.items()
    }


def rows(inputs, part):
    """Some samples of a batch; what all samples share (ids of tokens) stays."""
    count = len(inputs["hidden_states"])
    return {
        key: value[part] if isinstance(value, torch.Tensor) and len(value) == count and "ids" not in key else value
        for key, value in inputs.items()
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_forward_is_deterministic_and_of_the_right_shape(case, name):
    _, pipe, inputs, _ = case(name)
    model = pipe.transformer
    assert not model.training
    output = run(model, inputs)
    channels = inputs["hidden_states"].shape[1] * (
        2 if name == "pixart-sigma" else 1
    )  # a learned variance
    assert output.shape[:2] == (len(inputs["hidden_states"]), channels)
    assert output.shape[2:] == inputs["hidden_states"].shape[2:]
    assert bool(torch.isfinite(output).all())
    assert torch.equal(run(model, inputs), output)
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, output)


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("name", CASES)
def test_samples_of_a_batch_do_not_mix(case, name):
    _, pipe, inputs, _ = case(name)
    whole = run(pipe.transformer, inputs)
    for i in range(len(whole)):
        alone = run(pipe.transformer, rows(inputs, slice(i, i + 1)))
        assert torch.equal(alone, whole[i : i + 1])


@pytest.mark.parametrize("name", CASES)
def test_a_transformer_survives_saving_shards_and_a_variant(case, name, tmp_path):
    folder, pipe, inputs, _ = case(name)
    model = pipe.transformer
    expected = run(model, inputs)
    model.save_pretrained(tmp_path / "saved", variant="int8", max_shard_size="100KB")
    names = [path.name for path in (tmp_path / "saved").iterdir()]
    assert sum(name.endswith(".safetensors") for name in names) > 2
    again = type(model).from_pretrained(tmp_path / "saved", variant="int8")
    assert torch.equal(run(again, inputs), expected)
    other = type(model).from_pretrained(folder, subfolder="transformer")
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(other, inputs), expected)


@pytest.mark.parametrize("name", CASES)
def test_bf16_keeps_fp32_scales_and_errs_as_codes_and_roundings_do(case, float_folder, name):
    """Both models round in bf16, each by what it costs the float one; that and the codes add in energy. Below sqrt(2)
    times the sum, as nothing else errs as much. Flux multiplies timesteps and guidance by 1000, in bf16: 500 and 4000
    are exact there."""
    folder, pipe, inputs, _ = case(name)
    half, truth = (
        type(pipe.transformer).from_pretrained(
            source, subfolder="transformer", torch_dtype=torch.bfloat16
        )
        for source in (folder, float_folder(name))
    )
    scales = [p for n, p in half.named_parameters() if n.endswith("weight_scale")]
    assert scales
    assert {p.dtype for p in scales} == {torch.float32}
    if name == "flux":
        kept = {"timestep": 0.5, "guidance": 4.0}
        inputs = inputs | {
            key: torch.full_like(inputs[key], kept[key]) for key in kept if inputs[key] is not None
        }
    told, exact = cast(inputs, torch.bfloat16), cast(inputs, torch.float32)
    wide = type(half).from_pretrained(float_folder(name), subfolder="transformer")
    codes = relative(run(pipe.transformer, exact), run(wide, exact))
    rounding = relative(run(truth, told), run(wide, exact))
    error = relative(run(half, told), run(truth, told))
    assert 0 < error < 2**0.5 * math.hypot(codes, 2**0.5 * rounding)


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_survives_saving_and_keeps_its_results(case, call_of, name, tmp_path):
    _, pipe, _, images = case(name)
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(5)
    (same,) = again(generator=seed, return_dict=False, **call_of(again))
    assert (same == images).all()


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("name", CASES)
def test_a_prompt_is_drawn_alike_alone_and_in_a_batch(case, call_of, name):
    """Latents, before a VAE whose attention multiplies all images at once."""
    _, pipe, _, _ = case(name)
    call = call_of(pipe) | {"output_type": "latent"}
    seeds = lambda *numbers: [torch.Generator().manual_seed(n) for n in numbers]  # noqa: E731
    both = pipe(generator=seeds(1, 2), **call).images
    alone = pipe(generator=seeds(2), **{**call, "prompt": call["prompt"][1]}).images
    assert torch.equal(alone[0], both[1])
    several = pipe(num_images_per_prompt=2, generator=seeds(1, 3, 2, 4), **call).images
    assert several.shape == (4, *both.shape[1:])
    assert torch.equal(several[::2], both)


@pytest.mark.filterwarnings("ignore:cross_attention_kwargs")
@pytest.mark.parametrize("given", ["cross_attention_kwargs", "attention_mask"])
def test_the_report_follows_pixart_with_attention_arguments(case, given):
    """On a real caption mask; a block that is given them runs unfused, with equal integers."""
    _, pipe, inputs, _ = case("pixart-sigma")
    latents = inputs["hidden_states"]
    mask = torch.ones(len(latents), latents.shape[-1] ** 2 // 4)  # every token may be seen
    told = {"cross_attention_kwargs": {"strength": 1.0}, "attention_mask": mask}
    plain = ditq.execution_report(pipe.transformer, inputs)
    report = ditq.execution_report(pipe.transformer, {**inputs, given: told[given]})
    assert (plain.totals["fused_blocks"], report.totals["fused_blocks"]) == (2, 0)
    assert report.totals["integer_flops_share"] == plain.totals["integer_flops_share"]
    assert {row.note for row in report.blocks} == {f"{given} given to the model"}
