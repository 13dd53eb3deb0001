"""Low-rank adapters on packed models: the float model's update to the last bits, or a refusal. PEFT is the oracle."""

import copy
import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ditq_runtime as ditq
from ditq_converters import Recipe, convert
from ditq_converters.convert.fold import LinearTensors, block_linears, fold_block, stored_folds
from ditq_converters.convert.pack import make_scheme, pack_model
from ditq_converters.methods import Transform
from ditq_runtime import QuantLinear
from ditq_runtime.families import family_of
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.site import SITES, SiteFormat
from ditq_runtime.lora.branch import LoraBranch
from ditq_runtime.lora.file import read_adapters
from ditq_runtime.speed.cuda_graph import GraphedForward

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear"]
GROUPS, WIDTH = 3, 64
BOUNDS = torch.tensor([250.0, 600.0])


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def _transforms(seed, shifts):
    """Random factors on every foldable site; shifts per group on the AdaLN sites, one through V."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for site, groups in (("qkv", GROUPS), ("fc1", GROUPS), ("o_proj", 1)):
        smooth = 0.2 + 5 * torch.rand(WIDTH, generator=g, dtype=torch.float64)
        shift = torch.randn(groups, WIDTH, generator=g, dtype=torch.float64) if shifts else None
        made[site] = Transform(smooth, shift)
    return made


def _fold_exactly(model, shifts):
    """A packed model with random folds and unquantized fp32 weights: equal to the float model up to fp32 rounding."""
    family = family_of(type(model).__name__)
    tensors, formats = {}, {}
    for i, (block, table) in enumerate(family.block_tables(model).items()):
        linears: dict[str, LinearTensors] = block_linears(model.get_submodule(block), table)
        transforms = _transforms(i, shifts)
        fold_block(linears, table, transforms)
        for name, linear in linears.items():
            groups = linear.bias.shape[0]
            bias = linear.bias.flip(0).float()
            formats[f"{block}.{name}"] = LayerFormat("fp32", "none", groups=groups)
            tensors[f"{block}.{name}.weight"] = linear.weight.float()
            tensors[f"{block}.{name}.bias"] = bias if groups > 1 else bias[0]
        for site, stored in stored_folds(linears, table, transforms).items():
            tensors |= {f"{block}.{SITES}.{site}.{f}": t for f, t in stored.items()}
        if shifts:
            tensors[f"{block}.timestep_groups.bounds"] = BOUNDS
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return pack_model(model, make_scheme(model, family, formats, shapes), tensors, {})


def _with_peft(peft, model, seed=0, targets=TARGETS, **options):
    """The float model with a strong random adapter, and the adapter's state dict."""
    model = copy.deepcopy(model)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)
    peft.inject_adapter_in_model(config, model)
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=g)
    return model.eval(), config, peft.get_peft_model_state_dict(model)


def _run(model, timestep):
    latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(
            latents, timestep=torch.tensor(timestep), class_labels=torch.tensor([3, 1000])
        ).sample


def _error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def _state(state, alpha=6.0):
    """With the alphas that a bare state dict cannot say otherwise."""
    layers = {key.rpartition(".lora_")[0] for key in state}
    return {**state, **{f"{layer}.alpha": torch.tensor(alpha) for layer in layers}}


@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("timestep", [[100, 100], [400, 900], [900, 250]])
def test_a_folded_adapter_is_the_float_models_update(peft, build_model, shifts, timestep):
    model = build_model()
    packed = _fold_exactly(model, shifts)
    assert _error(_run(packed, timestep), _run(model, timestep)) < 1e-5  # the folds alone
    tuned, _, state = _with_peft(peft, model)
    changed = ditq.load_lora(packed, _state(state))
    assert len(changed) == 2 * len(TARGETS)
    expected = _run(tuned, timestep)
    assert _error(_run(model, timestep), expected) > 0.1  # the adapter does something
    # fp32 against fp32 through two blocks with factors up to 5: a few hundred roundings of 6e-8
    assert _error(_run(packed, timestep), expected) < 2e-5
    ditq.unload_lora(packed)
    assert _error(_run(packed, timestep), _run(model, timestep)) < 1e-5


@pytest.mark.parametrize("part", TARGETS)
def test_leaving_out_the_fold_of_any_linear_shows(peft, build_model, part, monkeypatch):
    """The oracle can tell: without the folds the same adapter is wrong on every folded linear."""
    model = build_model()
    packed = _fold_exactly(model, True)
    tuned, _, state = _with_peft(peft, model, targets=[part])
    monkeypatch.setattr(SiteFormat, "is_folded", False)
    ditq.load_lora(packed, _state(state))
    error = _error(_run(packed, [400, 900]), _run(tuned, [400, 900]))
    assert (error < 2e-5) if part == "ff.net.2" else (error > 1e-3)


@pytest.mark.filterwarnings("ignore:Adapter .* invalid shape")  # PEFT, of its own biases
def test_a_bias_of_the_adapter_is_folded_too(peft, build_model):
    model = build_model()
    packed = _fold_exactly(model, True)
    tuned, _, state = _with_peft(peft, model, lora_bias=True)
    assert any(key.endswith("lora_B.bias") for key in state)
    ditq.load_lora(packed, _state(state))
    assert _error(_run(packed, [10, 700]), _run(tuned, [10, 700])) < 2e-5


def test_float_linears_take_adapters_too(peft, build_model):
    model = build_model()
    packed = _fold_exactly(model, False)
    targets = ["proj_out_1", "proj_out_2", "timestep_embedder.linear_2"]
    tuned, _, state = _with_peft(peft, model, targets=targets)
    ditq.load_lora(packed, _state(state))
    assert _error(_run(packed, [10, 700]), _run(tuned, [10, 700])) < 2e-5


@pytest.mark.parametrize("name", ["w8_static", "w8_token", "w4p_token"])
def test_a_quantized_model_follows_the_tuned_float_model(
    peft, pipes, packed_folder, load, forward, name
):
    kind = "shared" if name == "w8_token" else "own"
    tuned, _, state = _with_peft(peft, pipes[kind].transformer)
    packed = load(packed_folder(name))
    before = forward(packed)
    ditq.load_lora(packed, _state(state))
    expected = forward(tuned)
    decibels = -20 * torch.log10(torch.tensor(_error(forward(packed), expected)))
    # 4-bit weights 15 dB, 8-bit 28 dB; the static ranges were calibrated without the adapter, so some inputs clip
    assert decibels > {"w4p_token": 15, "w8_static": 20, "w8_token": 28}[name]
    assert _error(before, expected) > 0.1
    report = ditq.execution_report(packed)
    assert report.totals["integer_linears"] == 12


def test_two_adapters_add_and_scale(peft, build_model):
    model = build_model()
    packed = _fold_exactly(model, True)
    first, _, state = _with_peft(peft, model, seed=1, targets=["to_q", "to_v"])
    ditq.load_lora(packed, _state(state), name="style")
    only = _run(packed, [10, 700])
    assert _error(only, _run(first, [10, 700])) < 2e-5
    ditq.load_lora(packed, _state(state), name="again", scale=-1.0)
    assert _error(_run(packed, [10, 700]), _run(model, [10, 700])) < 2e-5  # they cancel
    with pytest.raises(ValueError, match="an adapter 'style' is loaded"):
        ditq.load_lora(packed, _state(state), name="style")
    ditq.unload_lora(packed, "again")
    assert torch.equal(_run(packed, [10, 700]), only)
    with pytest.raises(ValueError, match="no adapter is called 'again'"):
        ditq.unload_lora(packed, "again")


def test_files_of_peft_and_of_diffusers(peft, build_model, tmp_path):
    model = build_model()
    options = {"alpha_pattern": {"attn1.to_q": 2}, "use_rslora": True}
    tuned, config, state = _with_peft(peft, model, **options)
    expected = _run(tuned, [10, 700])
    prefixed = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in state.items()}
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(prefixed, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    metadata = {f"transformer.{key}": value for key, value in config.to_dict().items()}
    metadata = {key: sorted(v) if isinstance(v, set) else v for key, v in metadata.items()}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(
        {f"transformer.{key}": tensor.contiguous() for key, tensor in state.items()},
        file,
        {"lora_adapter_metadata": json.dumps(metadata, default=str)},
    )
    for source in (folder, folder / "adapter_model.safetensors", tmp_path, str(file)):
        packed = _fold_exactly(model, True)
        ditq.load_lora(packed, source)
        assert _error(_run(packed, [10, 700]), expected) < 2e-5


def test_an_adapter_is_not_saved_and_survives_a_copy_and_a_cast(
    peft, pipes, packed_folder, load, forward, tmp_path
):
    model = load(packed_folder("w8_static"))
    file = "diffusion_pytorch_model.safetensors"
    _, _, state = _with_peft(peft, pipes["own"].transformer)
    ditq.load_lora(model, _state(state))
    twin = copy.deepcopy(model)
    assert torch.equal(forward(twin), forward(model))
    ditq.unload_lora(twin)
    assert not torch.equal(forward(twin), forward(model))
    model.save_pretrained(tmp_path)
    stored = packed_folder("w8_static") / "transformer" / file
    assert (tmp_path / file).read_bytes() == stored.read_bytes()
    half = model.bfloat16()
    assert half.transformer_blocks[0].attn1.to_q.adapters["default"].down.dtype == torch.bfloat16
    assert bool(torch.isfinite(forward(half, torch.bfloat16)).all())


A, B = torch.zeros(4, WIDTH), torch.zeros(WIDTH, 4)
LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({}, "no tensor in it"),
        ({f"{LAYER}.lora_A.weight": A}, "needs one lora_A.weight and one lora_B.weight, got down"),
        ({f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B[:, :3]}, r"\[4, 64\] and"),
        ({f"{LAYER}.lora_magnitude_vector.weight": A}, "no part of a plain LoRA"),
        ({f"{LAYER}.hada_w1_a": A}, "no part of a plain LoRA"),
        ({f"{LAYER}.lora_A.weight": A[:, :8], f"{LAYER}.lora_B.weight": B}, r"K, N = \(64, 64\)"),
        ({f"{LAYER}x.lora_A.weight": A, f"{LAYER}x.lora_B.weight": B}, "no linear of the model"),
        ({f"{LAYER}.lora_A.weight": A / 0, f"{LAYER}.lora_B.weight": B}, "not finite"),
        (
            {"text_encoder.q.lora_A.weight": A, "text_encoder.q.lora_B.weight": B},
            "none of the transformer",
        ),
    ],
)
def test_what_is_no_adapter_of_this_model_is_refused(packed_folder, load, forward, state, sentence):
    model = load(packed_folder("w8_static"))
    before = forward(model)
    good = {f"{LAYER}.lora_A.weight": A + 1, f"{LAYER}.lora_B.weight": B + 1} if state else {}
    with pytest.raises(ValueError, match=sentence):
        ditq.load_lora(model, {**good, **state} if "to_qx" in str(state) else state)
    assert torch.equal(forward(model), before)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            "'pissa_niter_4', which changed the float weights",
        ),
        ({"init_lora_weights": "olora"}, "'olora', which changed the float weights"),
        ({"transformer.init_lora_weights": "loftq"}, "'loftq', which changed the float weights"),
        ({"use_qalora": True}, "this is a QA-LoRA"),
        ({"alora_invocation_tokens": [1]}, "this is an aLoRA"),
    ],
)
def test_what_is_more_than_a_product_beside_the_weights_is_refused(config, sentence):
    """PEFT takes the start of a PiSSA from the float weights; a product beside all of them is silently wrong."""
    with pytest.raises(ValueError, match=sentence):
        read_adapters({f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B}, config)


def test_an_alpha_of_zero_is_zero():
    state = {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B}
    for config, strength in (({"lora_alpha": 0}, 0.0), ({"lora_alpha": 2}, 0.5), ({}, 1.0)):
        assert read_adapters(state, config).adapters[LAYER].strength == strength


def test_other_files_and_models_are_refused(build_model, packed_folder, load, tmp_path):
    model = load(packed_folder("w8_static"))
    torch.save({}, tmp_path / "lora.bin")
    for source, sentence in (
        (tmp_path / "lora.bin", "not a safetensors file"),
        ("someone/lora", "a hub id must be downloaded first"),
        (tmp_path, "holds neither adapter_model.safetensors nor"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ditq.load_lora(model, source)
    save_file({"x": A}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true}')
    with pytest.raises(ValueError, match="is a DoRA"):
        ditq.load_lora(model, tmp_path)
    with pytest.raises(ValueError, match="holds no packed ditq transformer"):
        ditq.load_lora(build_model(), {})


def test_an_offloaded_model_is_refused(packed_folder, load):
    accelerate = pytest.importorskip("accelerate")
    model = load(packed_folder("w8_static"))
    accelerate.cpu_offload(model, execution_device="cpu")
    state = {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B}
    with pytest.raises(ValueError, match="is offloaded; load the adapter first"):
        ditq.load_lora(model, state)


@pytest.mark.parametrize("target", ["to_q", "to_v", "to_out.0", "norm1.linear", "ff.net.0.proj"])
def test_peft_is_refused_on_folded_linears(peft, packed_folder, load, target):
    model = load(packed_folder("w8_static"))
    with pytest.raises(ValueError, match=r"silently wrong; use ditq\.load_lora"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[target]), model)


def test_peft_works_on_linears_that_nothing_was_folded_into(
    peft, pipes, packed_folder, load, forward
):
    """`w8_token` is made without smoothing: a plain adapter is right there."""
    tuned, config, state = _with_peft(peft, pipes["shared"].transformer)
    by_peft, by_us = load(packed_folder("w8_token")), load(packed_folder("w8_token"))
    assert not any(m.folded for m in by_peft.modules() if isinstance(m, QuantLinear))
    peft.inject_adapter_in_model(config, by_peft)
    peft.set_peft_model_state_dict(by_peft, state)
    ditq.load_lora(by_us, _state(state))
    expected = forward(tuned)
    assert _error(forward(by_peft.eval()), expected) < 0.04
    # both add the same branch; they round and sum it in another order, and a code may move by one
    assert _error(forward(by_us), forward(by_peft)) < 5e-3


def test_other_modules_may_be_called_base_layer():
    module = nn.Module()
    module.base_layer = nn.Linear(2, 2)
    assert isinstance(module.base_layer, nn.Linear)


def _few(seed):
    g = torch.Generator().manual_seed(seed)
    pairs = ((f"{LAYER}.lora_A.weight", A), (f"{LAYER}.lora_B.weight", B))
    return {key: torch.randn(like.shape, generator=g) for key, like in pairs}


def test_adapters_reach_a_compiled_model(build_model):
    packed = _fold_exactly(build_model(num_layers=1), False)
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    plain = _run(compiled, [10, 700])
    ditq.load_lora(compiled, _few(0))
    once = _run(compiled, [10, 700])
    assert torch.equal(once, _run(packed, [10, 700]))
    assert not torch.equal(once, plain)
    with torch.compiler.set_stance("fail_on_recompile"):  # a hot swap compiles nothing
        ditq.load_lora(compiled, _few(1), replace=True)
        swapped = _run(compiled, [10, 700])
    assert torch.equal(swapped, _run(packed, [10, 700]))
    assert not torch.equal(swapped, once)
    ditq.set_lora(compiled, {})
    assert torch.equal(_run(compiled, [10, 700]), plain)
    ditq.unload_lora(compiled)
    assert torch.equal(_run(compiled, [10, 700]), plain)
    torch.compiler.reset()


def test_a_captured_graph_would_not_see_an_adapter(packed_folder, load):
    model = load(packed_folder("w8_static"))
    graph = GraphedForward(model)
    with pytest.raises(ValueError, match="replays a CUDA graph"):
        ditq.load_lora(model, _few(0))
    graph.remove()
    assert ditq.load_lora(model, _few(0)) == [LAYER]


# -- what PEFT does that reads the float weight, which is codes here


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"use_dora": True}, "DoRA: it reads the float weight"),
        ({"init_lora_weights": "pissa"}, "'pissa': it reads the float weight"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"init_lora_weights": "mica"}, "'mica'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq'"),
        ({"init_lora_weights": "orthogonal"}, "'orthogonal'"),  # it takes the dtype of the weight
        ("OFTConfig", "OFT|oft"),
        ("BOFTConfig", "boft"),
        ("IA3Config", "ia3"),
    ],
)
def test_tuners_that_read_the_weight_are_refused(peft, packed_folder, load, options, sentence):
    model = load(packed_folder("w8_token"))
    targets = {"target_modules": ["to_q"]}
    if isinstance(options, dict):
        config = peft.LoraConfig(r=4, **targets, **options)
    else:
        extra = {"feedforward_modules": []} if options == "IA3Config" else {}
        extra |= {"oft_block_size": 8, "r": 0} if options == "OFTConfig" else {}
        config = getattr(peft, options)(**targets, **extra)
    with pytest.raises(ValueError, match=sentence):
        peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "LoKrConfig"])
def test_tuners_beside_the_weight_act_as_on_float(
    peft, pipes, packed_folder, load, forward, kind, tmp_path
):
    """What they add is that of the float model; merging is refused; what is saved is the model alone, and loads."""
    config = getattr(peft, kind)(r=4, target_modules=["to_q", "ff.net.2"])
    float_model, model = copy.deepcopy(pipes["shared"].transformer), load(packed_folder("w8_token"))
    plain, untuned = forward(model), forward(float_model)
    for m in (float_model, model):
        g = torch.Generator().manual_seed(0)
        peft.inject_adapter_in_model(config, m)
        for name, parameter in m.named_parameters():
            if "default" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)
    expected = forward(float_model.eval())
    assert _error(forward(model.eval()), expected) < 0.05 < 0.1 < _error(untuned, expected)
    report = ditq.execution_report(model)
    assert report.totals["integer_linears"] == 12
    assert {"transformer_blocks.0.attn1.to_q"} <= {row.name for row in report.layers}
    layers = [m for m in model.modules() if hasattr(m, "base_layer")]
    with pytest.raises(ValueError, match="merge: not possible"):
        layers[0].merge()
    model.save_pretrained(tmp_path)
    assert torch.equal(forward(type(model).from_pretrained(tmp_path)), plain)


def test_text_encoder_tensors_go_to_the_text_encoder(packed_folder, load):
    model, given = load(packed_folder("w8_static")), []
    text = {"text_encoder.q.lora_A.weight": A, "text_encoder.q.lora_B.weight": B}
    state = {f"transformer.{key}": value for key, value in _few(0).items()} | text
    with pytest.raises(ValueError, match="also holds a LoRA of text_encoder, which DiTTransformer"):
        ditq.load_lora(model, state)
    pipe = SimpleNamespace(
        transformer=model,
        text_encoder=nn.Linear(2, 2),
        load_lora_into_text_encoder=lambda tensors, **options: given.append((tensors, options)),
    )
    assert ditq.load_lora(pipe, state, name="style", scale=0.5) == [LAYER]
    ((tensors, options),) = given
    assert tensors == text
    assert options["prefix"] == "text_encoder"
    assert (options["adapter_name"], options["lora_scale"]) == ("style", 0.5)


@pytest.mark.parametrize("weights", ["w8", "w4p", "w4g"])
def test_a_flux_pipeline_loads_a_lora_beside_integers(weights, tmp_path):
    """Its loader compares shapes of weights; those of 4-bit codes are half."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
    ).eval().requires_grad_(False)  # fmt: skip
    names = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp")
    state = {}
    for name in names:
        linear = model.get_submodule(name)
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(4, linear.in_features) * 0.05
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(linear.out_features, 4) * 0.05
    packed = convert(model, Recipe("linear", weights, group_size=32), quiet=True)
    parts = dict.fromkeys(
        ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )
    pipe = diffusers.FluxPipeline(transformer=packed, **parts)
    linear, x = packed.get_submodule(names[0]), torch.randn(3, 64)
    before = linear(x)
    pipe.load_lora_weights(dict(state))
    down, up = (state[f"transformer.{names[0]}.lora_{part}.weight"] for part in "AB")
    added = packed.get_submodule(names[0])(x) - before
    torch.testing.assert_close(added, x @ down.T @ up.T, rtol=1e-4, atol=1e-4)
    packed.save_lora_adapter(tmp_path, adapter_name="default_0")  # diffusers: .to(dtype=None)
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert torch.equal(saved[f"{names[0]}.lora_B.weight"], up)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        packed.save_lora_adapter(tmp_path, adapter_name="default_0", upcast_before_saving=True)
    assert "to" not in vars(packed)
    pipe.unload_lora_weights()
    state[f"transformer.{names[0]}.lora_A.weight"] = torch.randn(4, 96)
    with pytest.raises(
        ValueError, match=r"to_q has K, N = \(64, 64\), but the adapter is for \(96, 64\)"
    ):
        pipe.load_lora_weights(dict(state))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_branch_is_the_same_under_autocast(half):
    branch = LoraBranch(torch.randn(4, 64), torch.randn(32, 4), torch.randn(32))
    x, y = torch.randn(5, 64), torch.randn(5, 32)
    expected = branch(x, y, 0.5)
    with torch.autocast("cpu", half):
        assert torch.equal(branch(x, y, 0.5), expected)
