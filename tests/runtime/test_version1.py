"""Checkpoints of format version 1, written by the code that had no other version, load to the same bits.

tests/fixtures/version1/make.py says how they were made and derives the bound of a forward.
"""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import ditq_runtime as ditq
from ditq_runtime.layers.site import Site

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "version1"
NAMES = ["dit_htg", "dit_token", "pixart", "sd3", "flux"]


def part_of(tensors, prefix):
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


def digest(tensor):
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}|{list(tensor.shape)}|".encode() + raw).hexdigest()[:16]


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """A loaded checkpoint, what its file holds, and what version 1 made of it."""
    folder = FIXTURES / request.param
    told = json.loads((folder / "expected.json").read_text())
    tensors = load_file(folder / "expected.safetensors")
    return SimpleNamespace(
        model=getattr(diffusers, told["class"]).from_pretrained(folder / "transformer"),
        stored=load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"),
        inputs=part_of(tensors, "input."),
        output=tensors["output"],
        rows=part_of(tensors, "rows."),
        layers=part_of(tensors, "layer."),
        floats=part_of(tensors, "float."),
        attentions=part_of(tensors, "attention."),
        **told,
    )


@pytest.fixture
def reference(case):
    """Every layer runs by itself, by its exact definition."""
    ditq.configure(case.model, linear="reference", fuse=False)
    yield
    ditq.configure(case.model, linear="auto")


def forward(case):
    with torch.no_grad():
        return case.model(**case.inputs, return_dict=False)[0]


def error(case, output):
    return float((output - case.output).norm() / case.output.norm())


def renamed(case):
    """Tensors of the file as version 2 calls them: what linears share stands once, folds beside it."""
    sites = {
        module: name for name, module in case.model.named_modules() if isinstance(module, Site)
    }
    found = {}
    for old, tensor in case.stored.items():
        layer, _, field = old.rpartition(".")
        if field in ("act_scale", "act_zero", "smooth_inv"):
            name = f"{sites[case.model.get_submodule(layer).site]}.{field}"
        else:
            name = old.replace(".folds.", ".ditq_sites.")
            name = name.replace(".shift", ".fold_shift") if name != old else old
        assert torch.equal(found.setdefault(name, tensor), tensor), old
    return found


def test_the_state_is_the_file(case):
    """An embedder stored once stands in every block; floats outside of packed layers are widened, which is exact."""
    state, case.stored = case.model.state_dict(), renamed(case)
    assert case.stored.keys() <= state.keys()
    for name, tensor in state.items():
        shared = name not in case.stored
        stored = case.stored[name.replace(".1.norm1.emb.", ".0.norm1.emb.") if shared else name]
        assert torch.equal(tensor, stored.to(tensor.dtype)), name
        keeps = "lora_" in name or not stored.is_floating_point()
        assert tensor.dtype == (stored.dtype if keeps else torch.float32), name


def test_weights_stand_for_the_same_numbers(case):
    layers = [(n, m) for n, m in case.model.named_modules() if isinstance(m, ditq.QuantLinear)]
    assert {name: digest(layer.dequantized_weight()) for name, layer in layers} == case.weights


def run_watched(case, compute):
    """What the named parts make of stored rows, called again inside of a forward: there they know the timestep groups.

    Args:
        case: whose model runs.
        compute: name -> function of the part of that name.
    """
    made = {}

    def watch(name):
        def call(part, args, output):
            made[name] = compute[name](part)

        return case.model.get_submodule(name).register_forward_hook(call)

    hooks = [watch(name) for name in compute]
    assert error(case, forward(case)) < case.bound
    for hook in hooks:
        hook.remove()
    return made


def assert_same(made, expected):
    assert made.keys() == expected.keys()
    for name, output in made.items():
        assert torch.equal(output, expected[name]), name


@pytest.mark.usefixtures("reference")
def test_integer_layers_give_the_same_bits(case):
    def compute(layer):
        return layer.forward(case.rows[str(layer.in_features)])

    assert_same(run_watched(case, dict.fromkeys(case.layers, compute)), case.layers)


@pytest.mark.usefixtures("reference")
def test_attentions_give_the_same_bits(case):
    """Where the checkpoint quantizes any."""

    def compute(attention):
        return attention.forward(*case.rows["attention"])

    assert_same(run_watched(case, dict.fromkeys(case.attentions, compute)), case.attentions)


@pytest.mark.usefixtures("reference")
def test_weight_only_layers_err_as_sums_do(case):
    """A sum of K products, a scale and a bias: each of two orders errs by (K + 2) 2^-24 of the magnitudes at most."""
    limits = {}

    def compute(layer):
        x, weight = case.rows[str(layer.in_features)][:, 0], layer.dequantized_weight()
        magnitudes = x.abs() @ weight.abs().t() + layer.bias.abs().amax()
        limits[layer] = 2 * (layer.in_features + 2) * 2.0**-24 * magnitudes
        return layer.forward(x)

    made = run_watched(case, dict.fromkeys(case.floats, compute))
    assert made.keys() == case.floats.keys()
    for name, output in made.items():
        limit = limits[case.model.get_submodule(name)]
        assert bool(((output - case.floats[name]).abs() <= limit).all()), name


def test_saved_again_it_is_of_version_2_and_the_same(case, tmp_path):
    case.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    assert set(config["scheme"]["layers"]) == set(case.weights)
    again = type(case.model).from_pretrained(tmp_path)
    assert again.config.quantization_config.scheme == case.model.config.quantization_config.scheme
    state = case.model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_forward_as_users_run_it(case):
    """Fused blocks and the processor's integer GEMMs, where there are any."""
    assert error(case, forward(case)) < case.bound


def test_classes_without_a_table_load_too(tmp_path):
    """Nothing was folded there: every linear is a site of its own. The folder is one of version 2, written back."""
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=32, num_layers=1, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        max_text_seq_length=6,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "float")
    choice = ditq.DitqConfig(weights="w8")
    packed = type(model).from_pretrained(tmp_path / "float", quantization_config=choice)
    packed.save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    quantization = config["quantization_config"]
    del quantization["digests"], quantization["scheme"]["sites"], quantization["scheme"]["timestep"]
    quantization["format_version"] = 1
    quantization["scheme"]["folds"] = {}
    for entry in quantization["scheme"]["formats"].values():
        entry["smooth"] = False
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    again = type(model).from_pretrained(tmp_path / "packed")
    assert again.config.quantization_config.scheme == packed.config.quantization_config.scheme
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())


@pytest.fixture
def damaged(tmp_path):
    """What changes a copy of a checkpoint, and what its loading says then."""

    def load(name, change):
        folder = shutil.copytree(FIXTURES / name / "transformer", tmp_path / "copy")
        config = json.loads((folder / "config.json").read_text())
        weights = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        change(config["quantization_config"]["scheme"], tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, weights, {"format": "pt"})
        with pytest.raises(ditq.CheckpointError) as caught:
            getattr(diffusers, config["_class_name"]).from_pretrained(folder)
        return str(caught.value)

    return load


KEY = "transformer_blocks.1.attn1.to_k"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s, t: s["folds"].update({"blocks.7.qkv": 0}), "folds name a site 'blocks.7.qkv'"),
        (lambda s, t: s["folds"].update({"transformer_blocks.0.fc2": 0}), "family cannot fold"),
        (lambda s, t: s["folds"].update({"transformer_blocks.0.qkv": -1}), "shifts of trans"),
        (lambda s, t: s["folds"].update({"transformer_blocks.0.qkv": 10**9}), "at most 65536"),
        (lambda s, t: s["folds"].update({"transformer_blocks.0.qkv": True}), "of type int, got T"),
        (lambda s, t: s["folds"].pop("transformer_blocks.0.qkv"), "qkv.fold_shift: unknown tensor"),
        (lambda s, t: s.update(sites={}), r"unknown keys ['sites']"),
        (lambda s, t: t.pop(f"{KEY}.act_scale"), f"{KEY}.act_scale: missing"),
        (lambda s, t: t[f"{KEY}.act_scale"].mul_(2), "differs from that of another linear"),
    ],
)
def test_damage_is_named(damaged, change, sentence):
    assert sentence in damaged("dit_htg", change)
