"""What users do to packed models through diffusers and torch: it works, or one sentence says why not."""

import copy
import json
import os
import pickle
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0

import ditq_runtime as ditq
from ditq_converters import Recipe, convert
from ditq_runtime import DitqConfig, QuantLinear
from ditq_runtime.attention.quantized import QuantAttention
from ditq_runtime.format.digests import config_digest
from ditq_runtime.host.float_twin import float_twin
from ditq_runtime.layers.site import Site


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
    ).eval().requires_grad_(False)  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 16), "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5]), "txt_ids": torch.zeros(6, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
    }  # fmt: skip
    return model, inputs


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def error(got, truth):
    return float((got - truth).norm() / truth.norm())


def test_a_single_file_is_quantized_as_it_loads(flux, tmp_path):
    model, inputs = flux
    model.save_pretrained(tmp_path)
    config = DitqConfig(weights="w4p", group_size=32)
    loaded = type(model).from_single_file(
        str(tmp_path / "diffusion_pytorch_model.safetensors"), config=str(tmp_path),
        quantization_config=config,
    )  # fmt: skip
    folder = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(run(loaded, inputs), run(folder, inputs))
    assert ditq.execution_report(loaded, inputs).totals["integer_linears"] > 10


def test_a_packed_single_file_is_refused(flux, tmp_path):
    model, _ = flux
    packed = convert(model, Recipe("linear"), out=tmp_path / "out", quiet=True)
    with pytest.raises(ValueError, match="a packed checkpoint is a folder"):
        type(model).from_single_file(
            str(tmp_path / "out" / "diffusion_pytorch_model.safetensors"),
            config=str(tmp_path / "out"), quantization_config=packed.config.quantization_config,
        )  # fmt: skip


def test_modules_to_not_convert_are_parts_of_names(flux, tmp_path):
    model, _ = flux
    model.save_pretrained(tmp_path)
    config = DitqConfig(weights="w8", modules_to_not_convert=["attn", "ff"])
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    integer = [n for n, m in loaded.named_modules() if getattr(m, "weight", None) is not None
               and isinstance(m, QuantLinear) and m.weight.dtype == torch.int8]  # fmt: skip
    assert integer
    assert not [name for name in integer if "attn" in name or "ff" in name]
    for wrong in ("attn", [""], [3]):
        with pytest.raises(ValueError, match="must be a list of parts of names"):
            DitqConfig(weights="w8", modules_to_not_convert=wrong)


@pytest.mark.parametrize("name", ["w8_static", "w8_token", "w4p_token", "w4g_static"])
def test_dequantize_gives_the_float_model_within_a_step(pipes, packed_folder, load, forward, name):
    """The weights differ by rounding alone: also where factors were folded, they are the float model's again."""
    kind = "shared" if name in ("w8_token", "w4g_static") else "own"
    truth, packed = pipes[kind].transformer, load(packed_folder(name))
    twin = float_twin(packed)
    assert type(twin) is diffusers.DiTTransformer2DModel
    assert not any(isinstance(m, QuantLinear) for m in twin.modules())
    # a weight is off by half a step at most: 1 / 254 of its row's maximum in 8 bits, 1 / 30 of a group's range in 4;
    # rows of 64 or 256 values have a maximum under 4.5 times their rms; uniform in a step: 1 / sqrt(3) of it
    bound = (4.5 / 254 if name.startswith("w8") else 4.5 / 15) / 3**0.5
    bound *= (
        3 if "static" in name or name == "w4p_token" else 1
    )  # smoothing moves range between columns
    for (key, want), got in zip(
        truth.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert error(got, want) <= bound if want.dim() > 1 else error(got, want) < 1e-6, key
    assert error(forward(twin), forward(truth)) < (0.02 if name.startswith("w8") else 0.3)
    assert twin.num_parameters() == truth.num_parameters() == packed.num_parameters()


def test_dequantize_refuses_what_no_float_model_holds(pipes, stats):
    packed = convert(pipes["own"], Recipe("htg", activations="static"), stats["own"], quiet=True)
    with pytest.raises(ValueError, match="has timestep groups, folded shifts"):
        packed.dequantize()


def test_dequantize_changes_the_model_as_other_quantizers_do(packed_folder, load, forward):
    packed = load(packed_folder("w8_token"))
    before, twin = forward(packed), float_twin(load(packed_folder("w8_token")))
    assert packed.dequantize() is packed
    assert not any(isinstance(m, QuantLinear) for m in packed.modules())
    assert torch.equal(forward(packed), forward(twin))
    assert error(forward(packed), before) < 0.02
    assert not hasattr(packed, "hf_quantizer")
    assert "quantization_config" not in packed.config
    packed.half()  # it is a float model, and may be cast


def test_a_shift_of_the_quantizer_is_taken_out_again(flux):
    model, inputs = flux
    packed = convert(model, Recipe("linear", activations="token_asym"), quiet=True)
    shifted = copy.deepcopy(packed)
    plain = float_twin(packed)
    name = "transformer_blocks.0.ff.net.2"
    linear = shifted.get_submodule(name)
    shift = torch.linspace(-1, 1, linear.in_features)
    object.__setattr__(linear.site.format, "shifts", 1)
    linear.site.shift = torch.nn.Parameter(shift[None], requires_grad=False)
    linear.bias.data += linear.dequantized_weight() @ shift  # W z
    twin = float_twin(shifted)
    for key, tensor in plain.state_dict().items():
        assert torch.allclose(twin.state_dict()[key], tensor, rtol=0, atol=1e-6), key
    # another grid of 255 steps over the shifted rows, one layer of many
    assert error(run(shifted, inputs), run(packed, inputs)) < 0.01


def test_a_dequantized_flux_computes_the_same(flux):
    model, inputs = flux
    packed = convert(model, Recipe("linear"), quiet=True)
    twin = float_twin(packed)
    # token activations alone differ: 1 / 254 of the largest of a row, through two blocks
    assert error(run(packed, inputs), run(twin, inputs)) < 0.02
    assert error(run(twin, inputs), run(model, inputs)) < 0.02


def test_pickle_and_torch_save_give_the_model_again(packed_folder, load, forward, tmp_path):
    model = load(packed_folder("w8_static"))
    expected = forward(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(forward(again), expected)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(forward(loaded), expected)
    assert type(loaded.transformer_blocks[0]) is type(model.transformer_blocks[0])
    assert loaded.num_parameters() == model.num_parameters()


def test_a_pickled_model_has_its_own_verbs(flux, tmp_path):
    model, inputs = flux
    packed = convert(model, Recipe("linear"), quiet=True)
    again = pickle.loads(pickle.dumps(packed))
    assert again.load_lora_adapter.model is again
    with pytest.raises(ValueError, match="fuse_qkv_projections: not possible"):
        again.fuse_qkv_projections()
    assert torch.equal(run(again, inputs), run(packed, inputs))
    again.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert stored["quantization_config"]["digests"]


def test_another_dtype_and_the_disk(packed_folder, load, forward, tmp_path):
    folder = packed_folder("w8_static")
    with pytest.raises(
        ValueError, match=r"computes in float32, float16 or bfloat16, got torch\.float64"
    ):
        load(folder, torch_dtype=torch.float64)
    expected = forward(load(folder))
    on_disk = load(folder, device_map={"": "disk"}, offload_folder=tmp_path)
    assert all(p.is_meta for p in on_disk.parameters())
    assert torch.equal(forward(on_disk), expected)


def test_the_report_of_a_compiled_model(packed_folder, load):
    model = load(packed_folder("w8_token"))
    expected = ditq.execution_report(model).to_dict()
    compiled = torch.compile(model, backend="eager")
    assert ditq.execution_report(compiled).to_dict() == expected
    model.compile_repeated_blocks(backend="eager")
    assert ditq.execution_report(model).to_dict() == expected


def test_the_report_refuses_flex_attention(flux):
    model, inputs = flux
    packed = convert(model, Recipe("linear"), quiet=True)
    packed.set_attention_backend("flex")
    with pytest.raises(ValueError, match="flex attention"):
        ditq.execution_report(packed, inputs)
    packed.set_attention_backend("native")
    run(packed, inputs)


def test_more_timestep_groups_than_calls_are_refused(pipes, stats):
    recipe = Recipe("htg", activations="static", num_groups=1000)
    with pytest.raises(ValueError, match="1000 timestep groups, but the statistics hold 2 calls"):
        convert(pipes["own"], recipe, stats["own"], quiet=True)


def test_perturbed_attention_splits_the_batch_of_grouped_layers(pipes, stats):
    """Its processor runs to_v on a third of the batch alone."""
    recipe = Recipe("htg", activations="static", num_groups=2)
    packed = convert(pipes["own"], recipe, stats["own"], quiet=True)
    assert any(m.format.groups == 2 for m in packed.modules() if isinstance(m, QuantLinear))
    float_model = copy.deepcopy(pipes["own"].transformer)
    outputs = []
    for model in (float_model, packed):
        model.transformer_blocks[1].attn1.set_processor(PAGCFGIdentitySelfAttnProcessor2_0())
        inputs = {
            "hidden_states": torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
            "class_labels": torch.tensor([3, 1000, 3]),
            "timestep": torch.tensor([400]).expand(3),
        }
        outputs.append(run(model, inputs))
    assert error(outputs[1], outputs[0]) < 0.05
    with pytest.raises(ValueError, match="no equal share of 3 samples; something splits the batch"):
        run(packed, {**inputs, "timestep": torch.tensor([400, 400, 400])})
    with pytest.raises(ValueError, match="0 rows are no equal share of 0 samples"):
        run(packed, {key: value[:0] for key, value in inputs.items()})


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_every_module_of_ours_in_a_forward_under_autocast_computes_as_without(flux, half):
    """Linears, sites and attentions, with the very inputs that a whole forward under autocast gives them."""
    model, inputs = flux
    packed = convert(model, Recipe("linear", "w4p", group_size=32, attention="int8"), quiet=True)
    ours, calls = (QuantLinear, Site, QuantAttention), []

    def keep(module, args, kwargs, output):
        calls.append((module, args, kwargs, output))

    hooks = [
        module.register_forward_hook(keep, with_kwargs=True)
        for module in packed.modules()
        if isinstance(module, ours)
    ]
    with torch.autocast("cpu", half):
        run(packed, inputs)
    for hook in hooks:
        hook.remove()
    assert {type(module) for module, *_ in calls} == set(ours)
    for module, args, kwargs, output in calls:
        with torch.no_grad():
            again = module(*args, **kwargs)
        pairs = zip(output, again, strict=True) if isinstance(output, tuple) else [(output, again)]
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs), module


SPAWNED = """
import json, sys
import torch
import torch.multiprocessing
import diffusers
import ditq_runtime

def forward(model, queue):
    torch.set_num_threads(1)
    inputs = torch.load(sys.argv[2])
    with torch.no_grad():
        queue.put(model(**inputs)[0].numpy().tobytes())

if __name__ == "__main__":
    torch.set_num_threads(1)
    model = diffusers.DiTTransformer2DModel.from_pretrained(sys.argv[1])
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=forward, args=(model, queue))
    process.start()
    there = queue.get(timeout=200)
    process.join()
    with torch.no_grad():
        assert model(**torch.load(sys.argv[2]))[0].numpy().tobytes() == there
    model.save_pretrained(sys.argv[3])
    print(json.dumps(sys.getfilesystemencoding()))
"""


def test_a_spawned_process_and_a_locale_without_utf_8(packed_folder, load, tmp_path):
    """Folders with names beyond ASCII, config texts too; the model goes to another process by pickle."""
    folder = tmp_path / "modell ä"
    load(packed_folder("w8_static")).save_pretrained(folder)
    config = folder / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["quantization_config"]["recipe"]["note"] = "größer"
    content["quantization_config"]["digests"]["config.json"] = config_digest(content)
    config.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([7, 400]),
        "class_labels": torch.tensor([0, 2]),
    }  # fmt: skip
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "spawned.py").write_text(SPAWNED, encoding="utf-8")
    locale = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = [sys.executable, "spawned.py", str(folder), "inputs.pt", "again"]
    done = subprocess.run(
        line, cwd=tmp_path, env=os.environ | locale, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert again["quantization_config"]["recipe"]["note"] == "größer"
