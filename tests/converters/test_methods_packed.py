"""Every method runs in integers: converted, saved, reloaded, with its groups and low-rank branches."""

import copy
import math

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

import ditq_runtime as ditq
from ditq_converters import Recipe, calibrate, convert
from ditq_converters.convert.fold import LinearTensors
from ditq_converters.convert.quantize import quantize_linear
from ditq_converters.methods import METHODS
from ditq_converters.methods.timestep_groups import greedy
from ditq_runtime.format.layer import LayerFormat
from ditq_runtime.format.site import SiteFormat
from ditq_runtime.layers.site import Site

STEPS = 30  # three timestep groups by default


@pytest.fixture(scope="module")
def model(make_dit):
    return make_dit(num_attention_heads=2, attention_head_dim=32)


@pytest.fixture(scope="module")
def stats(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("methods") / "stats"
    return calibrate(model, out, steps=STEPS, samples=2, quiet=True)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(11)
    return {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 340, 651, 999]),
        "class_labels": torch.tensor([1, 2, 3, 1000]),
    }


def forward(model, batch):
    with torch.no_grad():
        return model(**batch).sample


@pytest.mark.parametrize("activations", ["token", "static"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_survives_the_disk_and_stays_close(
    model, stats, batch, method, activations, tmp_path
):
    recipe = Recipe(method, "w4p", activations, group_size=32, lora_rank=None)
    packed = convert(model, recipe, stats, tmp_path / "out", quiet=True)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    truth, output = forward(model, batch), forward(loaded, batch)
    assert torch.equal(output, forward(packed, batch))
    # 4-bit weights of a random model: its weights are Gaussian, about 22 dB, and there are a dozen layers
    assert float((output - truth).norm() / truth.norm()) < 0.15
    report = ditq.execution_report(loaded)
    assert report.totals["integer_linears"] == 12
    assert report.totals["integer_attentions"] == (2 if method in ("ptq4dit", "htg") else 0)
    low_rank = METHODS[method].lora_rank
    assert all(
        f.lora_rank == low_rank
        for f in loaded.config.quantization_config.scheme.formats.values()
        if f.integer_gemm
    )


@pytest.fixture(scope="module")
def grouped(model, stats, tmp_path_factory):
    out = tmp_path_factory.mktemp("htg") / "out"
    convert(model, Recipe("htg", "w8", "static"), stats, out, quiet=True)
    return out


def test_groups_are_stored_as_the_format_says(grouped):
    tensors = load_file(grouped / "diffusion_pytorch_model.safetensors")
    for block in ("transformer_blocks.0", "transformer_blocks.1"):
        bounds = tensors[f"{block}.timestep_groups.bounds"]
        assert bounds.shape == (STEPS // 10 - 1,)
        assert bool((bounds.diff() > 0).all())
        shapes = {
            name: tuple(tensors[f"{block}.{name}.bias"].shape)
            for name in (
                "norm1.linear",
                "attn1.to_q",
                "attn1.to_out.0",
                "ff.net.0.proj",
                "ff.net.2",
            )
        }
        assert shapes == {
            "norm1.linear": (3, 6 * 64),
            "attn1.to_q": (3, 64),
            "attn1.to_out.0": (64,),  # one shift for all groups: V may be reused across steps
            "ff.net.0.proj": (3, 256),
            "ff.net.2": (256 // 4,),
        }


@pytest.mark.parity("P19")
@pytest.mark.usefixtures("row_by_row")
def test_a_batch_of_mixed_timesteps_equals_its_samples_alone(grouped, batch):
    loaded = DiTTransformer2DModel.from_pretrained(grouped)
    low, high = loaded.transformer_blocks[0].timestep_groups.bounds.tolist()
    batch = {**batch, "timestep": torch.tensor([3, int(low + high) // 2, 500, 999])}
    together = forward(loaded, batch)
    groups = loaded.transformer_blocks[0].timestep_groups(batch["timestep"])
    assert len(set(groups.tolist())) == 3
    for i in range(4):
        alone = forward(loaded, {key: value[i : i + 1] for key, value in batch.items()})
        assert torch.equal(alone, together[i : i + 1])


@pytest.mark.parity("P19")
def test_bias_tables_return_the_shift_through_the_unquantized_weight(model, stats):
    """b_g - b_h = W (z_g - z_h): with the dequantized W the residual is the quantization error, 1 % at 8 bits."""
    packed = convert(model, Recipe("htg", "w4p", "static", group_size=32), stats, quiet=True)
    for name in ("attn1.to_q", "ff.net.0.proj"):
        layer = packed.transformer_blocks[0].get_submodule(name)
        weight = model.transformer_blocks[0].get_submodule(name).weight.double()
        modulation = packed.transformer_blocks[0].norm1.linear
        chunk = 0 if name == "attn1.to_q" else 3
        # the modulation's shift rows hold u (b - z_g): their difference is u (z_h - z_g)
        taken = modulation.bias[:, chunk * 64 : (chunk + 1) * 64].double()
        taken = taken[0] - taken[1]
        returned = layer.bias[1].double() - layer.bias[0].double()
        # W diag(s) u (z_1 - z_0) = W (z_1 - z_0), whatever s is: solve for the column factor from a plain conversion
        smoothed = weight @ torch.diag(_smooth_of(packed, model, name)) @ taken
        torch.testing.assert_close(returned, smoothed, rtol=1e-4, atol=1e-5)


@pytest.mark.parity("P19")
def test_layers_with_groups_of_their_own_share_the_boundaries_of_their_block(
    model, stats, batch, tmp_path
):
    recipe = Recipe("htg", "w8", "static", num_groups=3, groups_per_layer=True)
    packed = convert(model, recipe, stats, tmp_path / "out", quiet=True)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    begins = {site: begins_of_groups(stats, f"transformer_blocks.0.{site}") for site in READERS}
    assert begins["qkv"] != begins["fc1"]
    edges = sorted(begins["qkv"] | begins["fc1"], reverse=True)  # calls, by rising timestep
    block = loaded.transformer_blocks[0]
    between = [(stats.timesteps[i - 1] + stats.timesteps[i]) / 2 for i in edges]
    assert block.timestep_groups.bounds.tolist() == between  # halves of integers, exact in fp32
    for site, name in READERS.items():
        rows = block.get_submodule(name).bias
        assert len(rows) == len(edges) + 1
        switches = [not torch.equal(rows[i], rows[i + 1]) for i in range(len(edges))]
        assert switches == [edge in begins[site] for edge in edges]
    assert torch.equal(forward(loaded, batch), forward(packed, batch))
    assert ditq.execution_report(loaded).totals["integer_linears"] == 12


@pytest.mark.parametrize("activations", ["token", "token_asym", "static"])
def test_modulation_can_read_integers(model, stats, batch, activations, tmp_path):
    """Its site quantizes silu(embedding); the layer is then what its dequantized weight makes of these codes."""
    recipe = Recipe("htg", "w8", "static", num_groups=2, modulation_activations=activations)
    packed = convert(model, recipe, stats, tmp_path / "out", quiet=True)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert torch.equal(forward(loaded, batch), forward(packed, batch))
    totals = ditq.execution_report(loaded).totals
    assert (totals["integer_linears"], totals["weight_only_linears"]) == (14, 1)
    block = loaded.transformer_blocks[0]
    layer, read = block.norm1.linear, []
    layer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    layer.register_forward_hook(lambda *call: read.append(call[2]))
    forward(loaded, batch)
    rows, out = read[0].double(), read[1].double()
    q, scale, zero = block.ditq_sites.norm1_linear(read[0])
    levels = q.double() if zero is None else q.double() - zero.double()[:, None]
    seen = levels * scale.double()[:, None]
    step = scale.double()[:, None].expand_as(rows)
    assert bool(((seen - rows).abs() <= 0.5001 * step).all())  # nothing was clipped
    group = block.timestep_groups(batch["timestep"])
    expected = seen @ layer.dequantized_weight().double().T + layer.bias.double()[group]
    # three roundings of fp32 on values below 16
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=4e-6)


READERS = {"qkv": "attn1.to_q", "fc1": "ff.net.0.proj"}


def begins_of_groups(stats, site):
    """The calls that begin a site's second and third of three groups."""
    low, high = (part.double() for part in stats.ranges(site))
    groups = greedy((low + high) / 2, 3)
    return {groups.index(1), groups.index(2)}


def _smooth_of(packed, model, name):
    """s of a site from the modulation: the multiplier's weight rows are W / s, here before quantization of 4 bits."""
    block, source = packed.transformer_blocks[0], model.transformer_blocks[0]
    chunk = 1 if name == "attn1.to_q" else 4
    rows = slice(chunk * 64, (chunk + 1) * 64)
    bias = source.norm1.linear.bias[rows].double() + 1
    return bias / block.norm1.linear.bias[0, rows].double()


def test_half_precision_keeps_the_tables(model, grouped, batch):
    """And rounds as often as the float model does: the errors of the codes and of the float model in bf16 add in
    energy; within sqrt(2), as nothing else errs as much as both."""
    loaded = DiTTransformer2DModel.from_pretrained(grouped, torch_dtype=torch.bfloat16)
    block = loaded.transformer_blocks[0]
    assert block.attn1.to_q.bias.dtype == torch.float32
    assert block.timestep_groups.bounds.dtype == torch.float32
    half = {**batch, "hidden_states": batch["hidden_states"].bfloat16()}
    truth = forward(model, batch)
    packed = forward(DiTTransformer2DModel.from_pretrained(grouped), batch)
    rounded = forward(copy.deepcopy(model).bfloat16(), half)
    error, codes, rounding = (
        float((x.float() - truth).norm()) for x in (forward(loaded, half), packed, rounded)
    )
    assert 0.5**0.5 < error / math.hypot(codes, rounding) < 2**0.5


def test_one_graph_serves_all_groups(grouped, batch):
    loaded = DiTTransformer2DModel.from_pretrained(grouped)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(loaded, fullgraph=True, backend=counter)
    for timestep in ([3, 3, 3, 3], [999, 999, 3, 340], [340, 3, 999, 651]):
        now = {**batch, "timestep": torch.tensor(timestep)}
        assert torch.equal(forward(compiled, now), forward(loaded, now))
    assert counter.frame_count == 1


def test_boundaries_that_do_not_rise_are_refused(grouped, monkeypatch):
    monkeypatch.setenv("DITQ_VERIFY", "0")  # its digest would be the first to say so
    path = grouped / "diffusion_pytorch_model.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    name = "transformer_blocks.1.timestep_groups.bounds"
    tensors[name] = tensors[name].flip(0)
    try:
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(
            ditq.CheckpointError, match=r"blocks\.1\.timestep_groups\.bounds: boundaries must"
        ):
            DiTTransformer2DModel.from_pretrained(grouped)
    finally:
        path.write_bytes(before)


@pytest.mark.parity("P8")
def test_ditas_without_its_branch_and_search_is_smoothquant_bit_for_bit(model, stats):
    plain = convert(model, Recipe("smoothquant", "w4p", "static", 32), stats, quiet=True)
    recipe = Recipe("ditas", "w4p", "static", 32, lora_rank=0, search=False)
    ditas = convert(model, recipe, stats, quiet=True)
    assert ditas.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in ditas.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_htg_without_shift_and_scale_is_linear_bit_for_bit(model, stats):
    plain = convert(model, Recipe("linear", "w8", "static"), stats, quiet=True)
    bare = {"shift": False, "scale": False, "attention": "none"}
    htg = convert(model, Recipe("htg", "w8", "static", **bare), stats, quiet=True)
    for name, tensor in htg.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


@pytest.mark.parametrize("weights", ["w8", "w4p"])
def test_the_low_rank_branch_takes_up_weight_error(weights):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(96, 128, generator=generator, dtype=torch.float64)
    source = LinearTensors(weight, torch.zeros(1, 96, dtype=torch.float64))
    errors = []
    for rank in (0, 8):
        group = 32 if weights == "w4p" else None
        layer_format = LayerFormat(weights, "token", group, lora_rank=rank)
        stored = quantize_linear(source, layer_format)
        layer = ditq.QuantLinear(128, 96, layer_format, device="cpu")
        layer.load_state_dict(stored, assign=True)
        stands_for = layer.dequantized_weight().double()
        if rank:
            stands_for = stands_for + stored["lora_up"].double() @ stored["lora_down"].double()
            assert stored["lora_down"].shape == (8, 128)
            assert stored["lora_up"].dtype == torch.bfloat16
        errors.append(float((stands_for - weight).norm()))
    assert errors[1] < 0.97 * errors[0]


def test_the_branch_runs_on_the_quantized_input():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    source = LinearTensors(weight, torch.randn(1, 40, generator=generator, dtype=torch.float64))
    layer_format = LayerFormat("w8", "token", lora_rank=4)
    layer = ditq.QuantLinear(64, 40, layer_format, device="cpu")
    layer.load_state_dict(quantize_linear(source, layer_format), assign=True)
    layer.read(Site(64, SiteFormat(("linear",), "token"), "cpu"))
    x = torch.randn(5, 64, generator=generator)
    scale = x.abs().amax(1, keepdim=True) / 127
    seen = (torch.round(x / scale) * scale).double()
    whole = layer.dequantized_weight().double() + layer.lora_up.double() @ layer.lora_down.double()
    expected = seen @ whole.t() + layer.bias.double()
    # between its factors the branch is rounded to bf16, 2^-8 of each of the 4 values; fp32 sums of 64 terms, 64 * 2^-24
    # of the sum of magnitudes, generously below 1e-4
    between = (seen @ layer.lora_down.double().t()).abs()
    bound = 2.0**-8 * between @ layer.lora_up.double().abs().t() + 1e-4
    assert ((layer(x).double() - expected).abs() <= bound).all()
    without = expected - (seen @ layer.lora_down.double().t()) @ layer.lora_up.double().t()
    assert not ((layer(x).double() - without).abs() <= bound).all()  # the branch shows
