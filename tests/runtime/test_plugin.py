"""Packed checkpoints through diffusers' own doors: loading, saving, casting, placing, compiling."""

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.quantizers import auto
from torch import nn

import ditq_runtime
from ditq_converters import Recipe, convert
from ditq_converters.plan.file import read_plan
from ditq_runtime import CheckpointError, DitqConfig, DitqQuantizer, QuantLinear, execution_report

NAMES = [
    "w8_static",
    "w8_token",
    "w4p_static",
    "w4p_token",
    "kept",
    "attention_static",
    "attention_token",
]
SHARED = {"w8_token", "w4p_static", "kept", "attention_token"}


def _same(model, other):
    """Every tensor of two models is equal, to the bit and the dtype."""
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def _sample(pipe, labels=(3, 7), steps=2):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipe(list(labels), num_inference_steps=steps, generator=generator, output_type="np")
    return torch.from_numpy(result.images)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_is_what_was_converted(pipes, stats, packed_folder, load, forward, name):
    kind = "shared" if name in SHARED else "own"
    loaded = load(packed_folder(name))
    made = read_plan(packed_folder(name) / "ditq" / "plan.json")
    packed = convert(pipes[kind], made, stats[kind], quiet=True)
    _same(loaded, packed)
    assert torch.equal(forward(loaded), forward(packed))


@pytest.mark.parametrize("name", NAMES)
def test_the_packed_model_is_near_the_float_model(pipes, packed_folder, load, forward, name):
    kind = "shared" if name in SHARED else "own"
    expected = forward(pipes[kind].transformer)
    noise = (forward(load(packed_folder(name))) - expected).square().mean()
    # 8-bit weights and activations: 30 dB and more; 4-bit weights (a step of 1/7.5 of a group's range): 15 dB and more
    decibels = 10 * torch.log10(expected.square().mean() / noise)
    assert decibels > (15 if name.startswith("w4p") else 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_door_gives_the_same_transformer(packed_folder, load, forward, dtype):
    folder = packed_folder("w4p_static")
    expected = load(folder, dtype=dtype)
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    assert type(pipe) is DiTPipeline
    output = forward(expected, dtype)
    assert output.dtype == dtype
    for model in (
        pipe.transformer,
        AutoModel.from_pretrained(str(folder / "transformer"), dtype=dtype),
        AutoModel.from_pretrained(str(folder), subfolder="transformer", dtype=dtype),
        DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype),
    ):
        assert type(model) is DiTTransformer2DModel
        _same(model, expected)
        assert torch.equal(forward(model, dtype), output)
    assert model.dtype == dtype


def test_a_pipeline_samples_with_and_without_guidance(packed_folder):
    pipe = DiffusionPipeline.from_pretrained(packed_folder("w8_token"))
    images = _sample(pipe)
    assert images.shape[:3] == (2, 32, 32)
    assert bool(torch.isfinite(images).all())
    assert torch.equal(images, _sample(pipe))
    assert pipe.get_label_ids(["seven"]) == [7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["w8_static", "w4p_static", "kept", "attention_static"])
def test_packed_tensors_load_to_the_bit_in_every_dtype(packed_folder, load, name, dtype):
    exact, cast = load(packed_folder(name)), load(packed_folder(name), dtype=dtype)
    for layer, module in exact.named_modules():
        if isinstance(module, QuantLinear):
            other = cast.get_submodule(layer)
            assert other.compute_dtype == dtype
            _same(other, module)
    assert cast.proj_out_2.weight.dtype == dtype
    assert cast.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.weight.dtype == dtype


@pytest.mark.parametrize("name", ["w8_static", "w4p_static"])
def test_only_modulation_stays_wide_in_half_precision(packed_folder, load, name):
    model = load(packed_folder(name), dtype=torch.bfloat16)
    row = torch.zeros(1, 64, dtype=torch.bfloat16)
    for layer in model.config.quantization_config.scheme.layers:
        if not layer.endswith("ff.net.2"):  # the others read 64 inputs
            modulation = layer.endswith("norm1.linear")
            expected = torch.float32 if modulation else torch.bfloat16
            assert model.get_submodule(layer)(row).dtype == expected, layer


def test_half_precision_costs_its_roundings(packed_folder, load, forward, cost_of_rounding):
    exact = forward(load(packed_folder("w8_token")))
    half = forward(load(packed_folder("w8_token"), dtype=torch.bfloat16), torch.bfloat16)
    rounding = cost_of_rounding(lambda: load(packed_folder("w8_token")), forward, torch.bfloat16)
    assert (half - exact).norm() / exact.norm() < 2 * rounding


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "50KB"}, {"variant": "int8"}])
@pytest.mark.parametrize("name", ["w8_static", "w4p_static", "kept", "attention_static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_is_a_round_trip(packed_folder, load, forward, tmp_path, options, name, dtype):
    first = load(packed_folder(name), dtype=dtype)
    first.save_pretrained(tmp_path / "again", **options)
    files = sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    assert (len(files) > 3) == ("max_shard_size" in options)
    assert all("int8" in file for file in files) == ("variant" in options)
    assert not [*(tmp_path / "again").glob("*.bin")]
    variant = {key: options[key] for key in options if key == "variant"}
    second = DiTTransformer2DModel.from_pretrained(tmp_path / "again", dtype=dtype, **variant)
    _same(second, first)
    assert torch.equal(forward(second, dtype), forward(first, dtype))
    execution_report(second)


def test_a_saved_file_holds_the_shared_embedder_once_and_equal_bytes(
    packed_folder, load, take_apart, tmp_path
):
    load(packed_folder("w4p_static")).save_pretrained(tmp_path)
    weights = take_apart(tmp_path / "diffusion_pytorch_model.safetensors")
    embedders = {name.split(".")[1] for name in weights.entries if ".norm1.emb." in name}
    assert embedders == {"0"}
    original = packed_folder("w4p_static") / "transformer"
    assert weights.raw == (original / "diffusion_pytorch_model.safetensors").read_bytes()
    first, second = (json.loads((f / "config.json").read_text()) for f in (original, tmp_path))
    assert first["quantization_config"] == second["quantization_config"]


def test_a_pipeline_is_saved_and_loaded(packed_folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(packed_folder("w8_static"))
    pipe.save_pretrained(tmp_path / "again")
    assert torch.equal(
        _sample(DiffusionPipeline.from_pretrained(tmp_path / "again")), _sample(pipe)
    )


def test_a_pickle_is_not_written(packed_folder, load, tmp_path):
    with pytest.raises(
        ValueError, match="saved as safetensors only; drop safe_serialization=False"
    ):
        load(packed_folder("w8_static")).save_pretrained(tmp_path, safe_serialization=False)
    assert not [*tmp_path.rglob("*.bin")]


def test_a_deep_copy_is_equal_and_can_be_saved(packed_folder, load, forward, tmp_path):
    model = load(packed_folder("w4p_static"))
    twin = copy.deepcopy(model)
    assert torch.equal(forward(twin), forward(model))
    assert len({id(block.norm1.emb) for block in twin.transformer_blocks}) == 1
    twin.save_pretrained(tmp_path)
    _same(DiTTransformer2DModel.from_pretrained(tmp_path), model)


def test_the_config_prints_and_is_json(packed_folder, load):
    model = load(packed_folder("w4p_static"))
    config = model.config.quantization_config
    stored = json.loads((packed_folder("w4p_static") / "transformer" / "config.json").read_text())
    assert stored["quantization_config"].pop("digests")  # of the file, not of what is in memory
    assert json.loads(json.dumps(config.to_dict())) == stored["quantization_config"]
    assert json.loads(config.to_json_string())["scheme"] == stored["quantization_config"]["scheme"]
    assert '"quant_method": "ditq"' in repr(config)
    assert '"quant_method": "ditq"' in model.to_json_string()
    assert str(config.quant_method) == "ditq"
    again = DitqConfig.from_dict(config.to_dict())
    assert again.scheme == config.scheme
    assert DitqConfig(config.scheme).scheme == DitqConfig(config.scheme.to_dict()).scheme
    assert isinstance(model.hf_quantizer, DitqQuantizer)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format_version": 3}, "format_version 3 is not one of"),
        ({"bits": 4}, r"unknown keys \['bits'\]"),
        ({"scheme": {"layers": {}}}, "scheme: missing keys"),
    ],
)
def test_configs_that_cannot_be_are_refused(packed_folder, load, options, sentence):
    scheme = load(packed_folder("w8_static")).config.quantization_config.scheme
    with pytest.raises(CheckpointError, match=sentence):
        DitqConfig(**{"scheme": scheme, **options})


def test_a_float_checkpoint_is_not_quantized_on_the_fly(build_model, packed_folder, load, tmp_path):
    build_model().save_pretrained(tmp_path)
    config = load(packed_folder("w8_static")).config.quantization_config
    with pytest.raises(ValueError, match=r"ditq convert|pre-quantized"):
        DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize("name", ["w8_static", "w4p_static", "attention_static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_footprint_is_the_bytes_that_are_stored(
    packed_folder, load, take_apart, tmp_path, name, dtype
):
    model = load(packed_folder(name), dtype=dtype)
    model.save_pretrained(tmp_path)
    entries = take_apart(tmp_path / "diffusion_pytorch_model.safetensors").entries
    stored = sum(len(data) for _, _, data in entries.values())
    # the table of positions is computed, not stored
    computed = sum(b.numel() * b.element_size() for b in model.buffers())
    assert model.get_memory_footprint(return_buffers=False) == stored
    assert model.get_memory_footprint() == stored + computed


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"])
def test_device_maps(packed_folder, load, forward, device_map):
    expected = forward(load(packed_folder("w4p_static")))
    model = load(packed_folder("w4p_static"), device_map=device_map)
    assert not any(p.is_meta for p in model.parameters())
    if device_map != "auto" or not torch.cuda.is_available():
        assert torch.equal(forward(model), expected)
        execution_report(model)


@pytest.mark.parametrize("name", ["w8_static", "w4p_token", "attention_static"])
def test_offloading_to_disk_and_back(packed_folder, load, forward, tmp_path, name):
    expected = forward(load(packed_folder(name)))
    places = {"pos_embed": "cpu", "transformer_blocks.0": "cpu", "transformer_blocks.1": "disk"}
    places |= {"norm_out": "cpu", "proj_out_1": "cpu", "proj_out_2": "cpu"}
    model = load(packed_folder(name), device_map=places, offload_folder=str(tmp_path))
    assert torch.equal(forward(model), expected)


@pytest.mark.parametrize("name", ["w8_static", "w4p_token"])
def test_low_memory_is_the_only_way_to_load(packed_folder, load, name):
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        load(packed_folder(name), low_cpu_mem_usage=False)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half()])
def test_diffusers_guards_the_dtype_of_a_quantized_model(packed_folder, load, cast):
    with pytest.raises(ValueError, match="quantized"):
        cast(load(packed_folder("w8_static")))


@pytest.mark.parity("P21")
@pytest.mark.usefixtures("row_by_row")
def test_samples_of_one_batch_do_not_mix(packed_folder, load):
    model = load(packed_folder("w8_token"))
    latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps, labels = torch.tensor([1, 400, 999]), torch.tensor([3, 1000, 7])
    with torch.no_grad():
        batch = model(latents, timestep=timesteps, class_labels=labels).sample
        for i in range(3):
            part = slice(i, i + 1)
            one = model(latents[part], timestep=timesteps[part], class_labels=labels[part]).sample
            assert torch.equal(one, batch[part])


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)
def test_compiled_whole_it_equals_eager(packed_folder, load, forward, cost_of_sums):
    """But for fused float code, which rounds sums of up to 256 terms in another order: 256 * 2**-24 of the largest."""
    # about half a minute at its first run
    bound = cost_of_sums(lambda: load(packed_folder("w8_token")), forward, 256 * 2.0**-24)
    model = load(packed_folder("w8_token"))
    expected = forward(model)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about its own modules
        compiled = torch.compile(model, fullgraph=True)
        got = forward(compiled)
    assert (got - expected).norm() / expected.norm() < bound


def test_compiling_makes_one_graph_for_all_timesteps(packed_folder, load):
    model = load(packed_folder("w4p_static"))
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    latents, labels = torch.zeros(1, 1, 8, 8), torch.tensor([3])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (900, 500, 1):
            got = compiled(latents, timestep=torch.tensor([step]), class_labels=labels).sample
            expected = model(latents, timestep=torch.tensor([step]), class_labels=labels).sample
            assert torch.equal(got, expected)
    assert len(graphs) == 1
    gemms = [target for target in graphs[0] if "ditq.gemm_" in target or "ditq::gemm_" in target]
    assert len(gemms) == 12  # two blocks of six, three of them fused with what follows
    torch.compiler.reset()


def test_repeated_blocks_compile_alone(packed_folder, load, forward):
    model = load(packed_folder("w8_token"))
    expected = forward(model)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert torch.equal(forward(model), expected)
    torch.compiler.reset()


def test_registering_again_changes_nothing():
    ditq_runtime.register()
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    ditq_runtime.register()
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert auto.AUTO_QUANTIZER_MAPPING["ditq"] is DitqQuantizer


def test_the_surface_is_what_all_names():
    assert len(set(ditq_runtime.__all__)) == len(ditq_runtime.__all__)
    assert all(hasattr(ditq_runtime, name) for name in ditq_runtime.__all__)


def test_a_new_process_needs_the_import_and_nothing_else(packed_folder, load, forward):
    code = """
import sys
import torch
from diffusers import DiTTransformer2DModel
try:
    DiTTransformer2DModel.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "Unknown quantization type" in str(error), error
    assert "ditq" in str(error), error
else:
    raise SystemExit("loaded without ditq_runtime")
import ditq_runtime
assert not any(name.startswith("ditq_kernels._triton") for name in sys.modules)
assert not torch.cuda.is_initialized()
model = DiTTransformer2DModel.from_pretrained(sys.argv[1])
latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    out = model(latents, timestep=torch.tensor([10, 900]), class_labels=torch.tensor([3, 1000]))
torch.save(out.sample, sys.argv[2])
"""
    folder = packed_folder("w8_static") / "transformer"
    saved = folder.parent.parent / "sample.pt"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(saved)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(saved), forward(load(packed_folder("w8_static"))))


def test_the_float_model_is_not_needed_any_more(build_model, pipes, tmp_path):
    pipes["own"].save_pretrained(tmp_path / "float")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "float")
    convert(pipe, Recipe("linear", "w8", "token"), out=tmp_path / "packed", quiet=True)
    del pipe
    shutil.rmtree(tmp_path / "float")
    assert str(tmp_path / "float") not in (tmp_path / "packed" / "model_index.json").read_text()
    images = _sample(DiffusionPipeline.from_pretrained(tmp_path / "packed"))
    assert bool(torch.isfinite(images).all())


def test_no_float_weight_of_a_listed_layer_is_left(packed_folder, load):
    model = load(packed_folder("w4p_static"))
    for name in model.config.quantization_config.scheme.layers:
        layer = model.get_submodule(name)
        assert layer.weight.dtype == (torch.int8 if name == "proj_out_1" else torch.uint8)
        assert (
            sum(p.numel() for p in layer.parameters() if p.dim() > 1 and p.is_floating_point()) == 0
        )
    floats = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert all(".norm1.emb." in n or n == "proj_out_2" for n in floats)
