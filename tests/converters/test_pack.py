"""Packing moves bits, not values: what is read back is what was made, and runs as fake quantization says (P24, P25)."""

import copy
import json
import struct

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

import ditq_kernels as k
from ditq_converters import Recipe, calibrate, convert, open_model
from ditq_runtime import QuantLinear
from ditq_runtime.families import family_of
from ditq_runtime.format.folder import open_folder
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.host.sizes import size_by_category
from ditq_runtime.host.skeleton import has_shared_embedder

FAMILY = family_of("DiTTransformer2DModel")
BLOCK_LINEARS = {
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "o_proj": ("attn1.to_out.0",),
    "fc1": ("ff.net.0.proj",),
    "fc2": ("ff.net.2",),
}
WIDTH = 64


@pytest.fixture(scope="module")
def calibrated(make_pipeline, tmp_path_factory):
    pipe = make_pipeline()
    stats = calibrate(
        pipe, tmp_path_factory.mktemp("stats"), steps=3, samples=4, guidance=2.0, quiet=True
    )
    return pipe, stats


RECIPES = [
    Recipe(method=method, weights=weights, activations=activations)
    for method in ("linear", "smoothquant")
    for weights in ("w8", "w4p")
    for activations in ("token", "static")
] + [
    Recipe("smoothquant", "w4g", "token"),
    Recipe("linear", "w4g", "static", group_size=32, symmetric=True),
]


def by_name(recipe):
    return f"{recipe.method}-{recipe.weights}-{recipe.activations}"


@pytest.fixture(scope="module", params=RECIPES, ids=by_name)
def packed(request, calibrated, tmp_path_factory):
    """(recipe, the model in memory, the same read back from disk, its folder)."""
    pipe, stats = calibrated
    out = tmp_path_factory.mktemp("packed") / "out"
    model = convert(pipe.transformer, request.param, stats, out, quiet=True)
    return request.param, model, DiTTransformer2DModel.from_pretrained(out), out


def own_smoothing(model, stats, recipe, block):
    """Site -> s by SmoothQuant Eq. 4 at alpha 1/2, written out: sqrt(a / w)."""
    if recipe.method == "linear":
        return {}
    factors = {}
    for site, names in BLOCK_LINEARS.items():
        low, high = stats.ranges(f"{block}.{site}")
        a = torch.cat([low, high]).abs().amax(0).double().clamp_min(1e-5)
        weights = [model.get_submodule(f"{block}.{name}").weight.double() for name in names]
        w = torch.cat(weights).abs().amax(0).clamp_min(1e-5)
        factors[site] = (a**0.5 / w**0.5).clamp(1e-4, 1e4)
    return factors


def own_fold(model, factors, block):
    """Linear -> (weight, bias) in fp64, folded independently: columns first, then rows."""
    folded = {}
    for site, names in BLOCK_LINEARS.items():
        for name in names:
            linear = model.get_submodule(f"{block}.{name}")
            weight = linear.weight.double()
            weight = weight * factors[site] if site in factors else weight
            folded[name] = [weight, linear.bias.double()]
    if "o_proj" in factors:
        u = 1 / factors["o_proj"]
        weight, bias = folded["attn1.to_v"]
        folded["attn1.to_v"] = [weight * u[:, None], bias * u]
    modulation = model.get_submodule(f"{block}.norm1.linear")
    weight, bias = modulation.weight.double().clone(), modulation.bias.double().clone()
    for first, site in ((0, "qkv"), (3, "fc1")):
        u = 1 / factors[site] if site in factors else torch.ones(WIDTH, dtype=torch.float64)
        shift = slice(first * WIDTH, (first + 1) * WIDTH)
        scale = slice((first + 1) * WIDTH, (first + 2) * WIDTH)
        bias[scale] += 1
        for rows in (shift, scale):
            weight[rows] *= u[:, None]
            bias[rows] *= u
    folded["norm1.linear"] = [weight, bias]
    return folded


def fake_quantized(weight, recipe):
    """The converter's own view of the weight it made: quantize, dequantize."""
    if recipe.weights == "w8":
        return k.quantize_weight_w8(weight.float()).dequantize()
    if recipe.weights == "w4g":
        w4g = k.quantize_weight_w4g(weight.float(), recipe.group, bool(recipe.symmetric))
        return w4g.dequantize()
    return k.quantize_weight_w4p(weight.float(), 64).dequantize()


@pytest.mark.parity("P24")
def test_what_is_read_back_is_the_fake_quantized_folded_weight(packed, calibrated):
    recipe, _, loaded, _ = packed
    pipe, stats = calibrated
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        factors = own_smoothing(pipe.transformer, stats, recipe, block)
        for name, (weight, bias) in own_fold(pipe.transformer, factors, block).items():
            layer = loaded.get_submodule(f"{block}.{name}")
            assert torch.equal(layer.dequantized_weight(), fake_quantized(weight, recipe)), name
            assert torch.equal(layer.bias, bias.float()), name
    final, theirs = loaded.proj_out_1, pipe.transformer.proj_out_1
    weight = k.quantize_weight_w8(
        theirs.weight
    ).dequantize()  # 8 bits whatever the recipe, unfolded
    assert torch.equal(final.dequantized_weight(), weight)
    assert torch.equal(final.bias, theirs.bias)


def test_memory_and_disk_agree(packed):
    _, model, loaded, _ = packed
    stored = loaded.state_dict()
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name]), name


def test_static_ranges_cover_the_calibration(packed, calibrated):
    recipe, _, loaded, _ = packed
    pipe, stats = calibrated
    if recipe.activations == "token":
        assert not any(name.endswith(("act_scale", "act_zero")) for name in loaded.state_dict())
        return
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        factors = own_smoothing(pipe.transformer, stats, recipe, block)
        for site, names in BLOCK_LINEARS.items():
            low, high = (
                t.double() / factors.get(site, 1.0) for t in stats.ranges(f"{block}.{site}")
            )
            low, high = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
            for name in names:
                layer = loaded.get_submodule(f"{block}.{name}").site
                # fp32 rounding of the ends, of their difference and of the quotient
                assert layer.act_scale.item() == pytest.approx((high - low) / 255, rel=1e-6)
                assert abs(layer.act_zero.item() - (-low / layer.act_scale.item() - 128)) <= 0.5001


class FakeLinear(nn.Module):
    """Quantize, dequantize, float matrix product: the textbook simulation of an integer layer."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.dequantized_weight(), layer.bias
        self.kind = layer.format.activations
        site = layer.site
        self.u = None if site is None else site.smooth_inv
        self.static = (site.act_scale, site.act_zero) if self.kind == "static" else None
        self.truth = None

    def steps(self, x):
        """How many steps each value lies from zero, not rounded, within the range; and the step."""
        x = x if self.u is None else x * self.u
        if self.kind == "token":
            scale = (x.abs().amax(-1, keepdim=True) / torch.tensor(127.0)).clamp_min(2.0**-40)
            return (x * (1 / scale)).clamp(-127, 127), scale
        scale, zero = self.static
        return (x * (1 / scale)).clamp(-128 - zero, 127 - zero), scale

    def forward(self, x):
        if self.kind != "none":
            steps, scale = self.steps(x)
            codes = steps.round()
            if self.truth is not None:
                moved = codes != self.truth
                middle = (codes + self.truth) / 2
                assert ((codes - self.truth).abs() <= 1).all()
                assert ((steps - middle).abs()[moved] < 1e-3).all()
                codes = self.truth
            x = codes * scale
        return nn.functional.linear(x, self.weight, self.bias)


def simulation(loaded):
    fake = copy.deepcopy(loaded)
    for name, layer in loaded.named_modules():
        if isinstance(layer, QuantLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(fake.get_submodule(parent), leaf, FakeLinear(layer))
    return fake


@pytest.mark.parity("P25")
def test_every_layer_runs_as_its_simulation(packed, inputs):
    """P25, layer by layer, on the inputs the integer model meets: fp32 sums of 256 terms stay below 1e-5."""
    _, _, loaded, _ = packed
    seen = {}
    for name, layer in loaded.named_modules():
        if isinstance(layer, QuantLinear):
            layer.register_forward_hook(
                lambda _, args, output, name=name: seen.__setitem__(name, (args[0], output))
            )
    with torch.no_grad():
        loaded(**inputs(loaded))
        assert len(seen) == 15
        for name, (x, output) in seen.items():
            expected = FakeLinear(loaded.get_submodule(name))(x)
            assert (output - expected).norm() < 1e-5 * expected.norm(), name
    for layer in loaded.modules():
        layer._forward_hooks.clear()


@pytest.mark.parity("P25")
def test_the_whole_model_runs_as_its_simulation(packed, inputs):
    """P25, end to end, to 1e-5. Roundings of 1e-7 may push a value over a rounding boundary, which moves its code by
    a whole step: a code may differ only within 1e-3 of a boundary, and then the integer model's is taken."""
    _, _, loaded, _ = packed
    fake = simulation(loaded)
    batch, hooks = inputs(loaded), []
    for name, layer in fake.named_modules():
        if isinstance(layer, FakeLinear) and layer.kind != "none":

            def take(_, args, layer=layer):
                layer.truth = layer.steps(args[0])[0].round()

            hooks.append(loaded.get_submodule(name).register_forward_pre_hook(take))
    with torch.no_grad():
        integer, simulated = loaded(**batch).sample, fake(**batch).sample
    for hook in hooks:
        hook.remove()
    total = sum(m.truth.numel() for m in fake.modules() if getattr(m, "truth", None) is not None)
    assert total == 2 * 3 * 16 * (3 * 64 + 64 + 64 + 256)  # blocks, images, tokens, inputs
    assert (integer - simulated).norm() < 1e-5 * simulated.norm()


def header(path):
    with path.open("rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


@pytest.mark.parity("P24")
def test_sizes_add_up_to_the_bytes_on_disk(packed):
    recipe, _, _, out = packed
    (file,) = out.glob("*.safetensors")
    sizes = size_by_category(open_folder(out))
    assert sum(sizes.values()) == file.stat().st_size
    linears = 2 * WIDTH * (3 * WIDTH + WIDTH + 4 * WIDTH + 4 * WIDTH)  # 2 blocks
    modulations = 2 * WIDTH * 6 * WIDTH
    bytes_of = {"w8": 1, "w4p": 0.5, "w4g": 0.5}
    assert sizes["block weights"] == linears * bytes_of[recipe.weights]
    final = WIDTH * 2 * WIDTH  # w8
    assert sizes["modulation weights"] == modulations * bytes_of[recipe.modulation_weights] + final
    per_group = {"w8": 0, "w4p": 2, "w4g": 5}  # scale and offset; fp32 scale and zero point
    groups = linears * per_group[recipe.weights] // recipe.group
    groups += modulations * per_group[recipe.modulation_weights] // recipe.group
    if (recipe.weights, recipe.activations) == ("w4g", "static"):
        groups += 4 * linears // recipe.group  # an int32 sum
    assert sizes["group scales and offsets"] == groups
    biases = 2 * (3 * WIDTH + WIDTH + 4 * WIDTH + WIDTH + 6 * WIDTH) + 2 * WIDTH
    assert sizes["biases"] == 4 * biases
    entries = {n: e["data_offsets"] for n, e in header(file).items() if n != "__metadata__"}
    floats = sum(end - start for n, (start, end) in entries.items() if ".norm1.emb." in n)
    assert sizes["timestep and label embedder"] == floats


def test_the_float_model_shares_no_memory_with_the_packed(make_dit):
    model = make_dit()
    packed = convert(model, Recipe(method="linear", keep=("*.to_q",)), quiet=True)
    theirs = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    ours = {tensor.data_ptr() for tensor in [*packed.parameters(), *packed.buffers()]}
    assert not theirs & ours
    assert not any(tensor.is_meta for tensor in [*packed.parameters(), *packed.buffers()])
    assert not packed.training


def test_what_is_not_listed_is_copied(make_dit):
    model = make_dit()
    packed = convert(model, Recipe(method="linear"), quiet=True)
    stored = packed.state_dict()
    listed = ("transformer_", "proj_out_1.")
    copied = [n for n in model.state_dict() if ".norm1.emb." in n or not n.startswith(listed)]
    assert "proj_out_2.weight" in copied
    for name in copied:
        assert torch.equal(stored[name], model.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_pack_with_fp32_scales(make_dit, inputs, dtype):
    model = make_dit().to(dtype)
    packed = convert(model, Recipe(method="linear"), quiet=True)
    layer = packed.transformer_blocks[0].attn1.to_q
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
    assert packed.proj_out_2.weight.dtype == dtype
    with torch.no_grad():
        truth, other = model(**inputs(model)).sample, packed(**inputs(model)).sample
    assert other.dtype == dtype
    # 8 bits cost about 1 %, bf16 arithmetic about 1 %
    assert (other.float() - truth.float()).norm() < 0.05 * truth.float().norm()


def test_one_embedder_is_stored_where_all_are_equal(tmp_path):
    pipe = open_model("demo:digits")
    assert has_shared_embedder(pipe.transformer, FAMILY)
    convert(pipe.transformer, Recipe(method="linear"), out=tmp_path / "out", quiet=True)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tables = [name for name in header(file) if "embedding_table" in name]
    assert tables == ["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["scheme"]["shared_embedder"] is True


def test_embedders_that_differ_in_one_bit_are_all_stored(make_dit, tmp_path):
    model = make_dit()
    assert not has_shared_embedder(model, FAMILY)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    model.transformer_blocks[1].norm1.emb.load_state_dict(first)
    assert has_shared_embedder(model, FAMILY)
    bias = model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias
    bias[0] = torch.nextafter(bias[0], torch.tensor(1e9))
    assert not has_shared_embedder(model, FAMILY)
    assert not has_shared_embedder(make_dit(num_layers=1), FAMILY)


@pytest.mark.parametrize(
    ("layer_format", "name"),
    [
        (LayerFormat("w8", "token"), "w8_token"),
        (LayerFormat("w4p", "token_asym", 64), "w4p64_token_asym"),
        (LayerFormat("w8", "none"), "w8_weight_only"),
        (LayerFormat("w8", "token", bias=False), "w8_token_nobias"),
        (LayerFormat("fp32", "none"), "fp32"),
        (LayerFormat("fp32", "none", bias=False), "fp32_nobias"),
    ],
)
def test_format_names(layer_format, name):
    assert layer_format.name == name
