"""Quantizing a float checkpoint while diffusers loads it: the same file as the converter's, and refusals."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, PipelineQuantizationConfig

from ditq_bench.launches import launches_of
from ditq_converters import Recipe, convert
from ditq_runtime import CheckpointError, DitqConfig, QuantLinear, configure, execution_report
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.scheme import Scheme
from ditq_runtime.host.on_the_fly import PackedView

FILE = "diffusion_pytorch_model.safetensors"
CHOICES = {
    "w8": {"weights": "w8"},
    "w4p": {"weights": "w4p", "group_size": 32},
    "w4g": {"weights": "w4g", "group_size": 32},
    "mixed": {"weights": "w4p", "group_size": 32, "modulation": "w8"},
    "attention": {"weights": "w8", "attention": "int8"},
    "attention kept": {"weights": "w8", "attention": "bf16", "keep": ("*.0.attn1",)},
    "kept": {"weights": "w8", "keep": ("*.attn1.to_q", "transformer_blocks.0.norm1.linear")},
}


@pytest.fixture(scope="module")
def float_folder(pipes, tmp_path_factory):
    """Kind -> a float pipeline folder."""
    made = {}
    for kind, pipe in pipes.items():
        made[kind] = tmp_path_factory.mktemp("float") / kind
        pipe.save_pretrained(made[kind])
    return made


def _load(folder, choice, **options):
    return DiTTransformer2DModel.from_pretrained(
        folder / "transformer", quantization_config=DitqConfig(**choice), **options
    )


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_it_is_the_converters_file_to_the_byte(pipes, float_folder, tmp_path, kind, name):
    _load(float_folder[kind], CHOICES[name]).save_pretrained(tmp_path / "loaded")
    recipe = Recipe("linear", activations="token", **CHOICES[name])
    convert(pipes[kind].transformer, recipe, out=tmp_path / "converted", quiet=True)
    ours, expected = (tmp_path / f / FILE for f in ("loaded", "converted"))
    assert ours.read_bytes() == expected.read_bytes()
    schemes = [
        json.loads((tmp_path / f / "config.json").read_text())["quantization_config"]["scheme"]
        for f in ("loaded", "converted")
    ]
    assert schemes[0] == schemes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_saved_and_loaded_again_it_is_equal(float_folder, forward, tmp_path, kind, dtype):
    made = _load(float_folder[kind], CHOICES["w4p"], dtype=dtype)
    made.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(forward(again, dtype), forward(made, dtype))
    assert again.state_dict().keys() == made.state_dict().keys()
    execution_report(again)
    execution_report(made)


def test_half_precision_quantizes_the_stored_weights_not_rounded_ones(float_folder):
    exact, half = (
        _load(float_folder["own"], CHOICES["w8"], dtype=d) for d in (torch.float32, torch.bfloat16)
    )
    for name, module in exact.named_modules():
        if isinstance(module, QuantLinear):
            other = half.get_submodule(name)
            assert torch.equal(other.weight, module.weight)
            assert torch.equal(other.weight_scale, module.weight_scale)
            assert other.compute_dtype == torch.bfloat16
    assert half.proj_out_2.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "saved", [{"max_shard_size": "30KB"}, {"safe_serialization": False}, {"variant": "ema"}]
)
def test_every_kind_of_float_folder(build_model, forward, tmp_path, saved):
    model = build_model()
    model.save_pretrained(tmp_path / "odd", **saved)
    model.save_pretrained(tmp_path / "plain")
    options = {key: saved[key] for key in saved if key == "variant"}
    config = DitqConfig(weights="w8")
    odd = DiTTransformer2DModel.from_pretrained(
        tmp_path / "odd", quantization_config=config, **options
    )
    plain = DiTTransformer2DModel.from_pretrained(tmp_path / "plain", quantization_config=config)
    assert torch.equal(forward(odd), forward(plain))
    if "max_shard_size" in saved:
        assert (
            len([*(tmp_path / "odd").glob("*.safetensors")]) > 10
        )  # weights and biases come apart


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(float_folder, forward, device_map):
    placed = _load(float_folder["own"], CHOICES["w8"], device_map=device_map)
    assert torch.equal(forward(placed), forward(_load(float_folder["own"], CHOICES["w8"])))


def test_layers_on_disk_are_stored_packed(float_folder, forward, tmp_path):
    places = {"pos_embed": "cpu", "transformer_blocks.0": "cpu", "transformer_blocks.1": "disk"}
    places |= {"norm_out": "cpu", "proj_out_1": "cpu", "proj_out_2": "cpu"}
    folder = float_folder["own"]
    model = _load(folder, CHOICES["w4p"], device_map=places, offload_folder=str(tmp_path))
    assert torch.equal(forward(model), forward(_load(folder, CHOICES["w4p"])))
    stored = (tmp_path / "transformer_blocks.1.attn1.to_q.weight.dat").stat().st_size
    assert stored == 64 * 64 // 2


def test_a_pipeline_is_quantized_through_its_own_config(float_folder, tmp_path):
    config = PipelineQuantizationConfig(quant_mapping={"transformer": DitqConfig(weights="w8")})
    pipe = DiffusionPipeline.from_pretrained(float_folder["own"], quantization_config=config)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    images = [
        p([3], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
        for p in (pipe, again)
    ]
    assert (images[0].images == images[1].images).all()
    assert isinstance(pipe.transformer.transformer_blocks[0].attn1.to_q, QuantLinear)
    assert not any(isinstance(m, QuantLinear) for m in pipe.vae.modules())


def test_one_config_serves_two_models(float_folder, forward):
    """Loading resolves a copy: the user's object stays the choice it was."""
    config = DitqConfig(weights="w8")
    folder = float_folder["shared"] / "transformer"
    first, second = (
        DiTTransformer2DModel.from_pretrained(folder, quantization_config=config) for _ in range(2)
    )
    assert torch.equal(forward(first), forward(second))
    assert json.loads(json.dumps(config.to_dict()))["weights"] == "w8"
    assert '"weights": "w8"' in repr(config)
    assert first.config.quantization_config.recipe["on_the_fly"] is True
    with pytest.raises(AttributeError, match="no scheme before a model is loaded"):
        _ = config.scheme


def test_one_layer_is_held_at_a_time():
    """Iterating the view never holds two packed layers, and the float source is not copied."""
    rows, layers = 256, 40
    formats = {f"l{i}": LayerFormat("w8", "token") for i in range(layers)}
    scheme = Scheme.of("X", False, formats, {})
    source = {f"l{i}.weight": torch.randn(rows, 256) for i in range(layers)}
    view = PackedView(source, scheme)
    assert list(view)[:3] == ["l0.weight", "l0.weight_scale", "l1.weight"]
    assert len(view) == 2 * layers
    held = []
    for name, tensor in view.items():
        assert tensor.dtype == (torch.int8 if name.endswith("weight") else torch.float32)
        held.append(sum(t.numel() for t in view._last[1].values()))
    assert max(held) == rows * 256 + rows


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({}, "give weights='w8', 'w4p' or 'w4g'"),
        ({"weights": "int8"}, "weights must be one of w8, w4p, w4g, got 'int8'"),
        ({"weights": "w8", "activations": "static"}, "need a calibration.*ditq convert"),
        (
            {"weights": "w8", "activations": "fp8"},
            "activations must be one of token, token_asym, got",
        ),
        ({"weights": "w4p", "group_size": 48}, "multiple of 32, got 48"),
        ({"weights": "w8", "modulation": "bf16"}, "modulation must be one of"),
        ({"weights": "w8", "keep": "*.to_q"}, "must be a tuple of patterns"),
    ],
)
def test_choices_that_cannot_be_are_refused(choice, sentence):
    with pytest.raises(ValueError, match=sentence):
        DitqConfig(**choice)


def test_a_pattern_that_matches_nothing_is_refused(float_folder):
    with pytest.raises(ValueError, match="matches none of the 15 quantized modules"):
        _load(float_folder["own"], {"weights": "w8", "keep": ("*.to_query",)})


def test_inputs_that_no_group_divides_are_refused(build_model, tmp_path):
    build_model(num_attention_heads=3, attention_head_dim=12).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"to_q: .*K=36.*keep=|take weights='w8'"):
        DiTTransformer2DModel.from_pretrained(
            tmp_path, quantization_config=DitqConfig(weights="w4p")
        )


def test_a_weight_that_is_not_finite_is_refused_by_name(build_model, tmp_path):
    model = build_model()
    model.transformer_blocks[1].attn1.to_v.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn1\.to_v\.weight.*not finite"):
        DiTTransformer2DModel.from_pretrained(
            tmp_path, quantization_config=DitqConfig(weights="w8")
        )


def test_a_float_checkpoint_that_lacks_a_weight_is_refused(build_model, tmp_path, take_apart):
    build_model().save_pretrained(tmp_path)
    take_apart(tmp_path / FILE).write({"transformer_blocks.0.attn1.to_q.weight": None})
    with pytest.raises(CheckpointError, match=r"attn1\.to_q\.weight.*was not loaded"):
        DiTTransformer2DModel.from_pretrained(
            tmp_path, quantization_config=DitqConfig(weights="w8")
        )


def test_a_packed_checkpoint_is_not_quantized_again(packed_folder, load, forward):
    """diffusers keeps what the checkpoint says and warns; the result is the checkpoint."""
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(packed_folder("w8_static"), quantization_config=DitqConfig(weights="w4p"))
    assert torch.equal(forward(model), forward(load(packed_folder("w8_static"))))


@pytest.mark.parametrize("weights", ["w8", "w4p", "w4g"])
def test_zero_points_of_tokens_cost_no_launch_and_fused_blocks_keep_their_bits(
    float_folder, forward, weights
):
    launches, outputs = [], []
    for activations in ("token", "token_asym"):
        choice = {"weights": weights, "activations": activations, "group_size": 32}
        model = _load(float_folder["own"], choice)
        launches.append(launches_of(model.transformer_blocks[0], 64, 16))
        outputs.append(forward(model))
        assert execution_report(model).totals["fused_blocks"] == len(model.transformer_blocks)
    configure(model, fuse=False)
    assert torch.equal(forward(model), outputs[1])
    assert launches[0] == launches[1]
    assert sum(launches[0][op] for op in launches[0] if op.startswith("ditq.")) == 10
    assert not torch.equal(*outputs)
