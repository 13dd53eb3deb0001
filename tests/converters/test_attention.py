"""Quantized attention from calibration to file: ranges as recorded by hand, folded values, refusals, P3."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

import ditq_kernels as k
import ditq_runtime as ditq
from ditq_converters import Recipe, StatisticsError, calibrate, convert
from ditq_converters.convert.fold import block_linears
from ditq_converters.convert.site_data import site_data
from ditq_converters.convert.transforms import decide
from ditq_converters.methods import METHODS
from ditq_converters.plan.make import make_plan
from ditq_kernels.reference import attention as reference
from ditq_runtime.families import family_of
from ditq_runtime.format.attention import AttentionFormat

FAMILY = family_of("DiTTransformer2DModel")
BLOCKS = ("transformer_blocks.0", "transformer_blocks.1")
HEADS, HEAD_DIM = 2, 32
OPERANDS = ("q", "k", "v")
SMALL = {"steps": 3, "samples": 2, "quiet": True}
STATIC = AttentionFormat("int8", "static")


@pytest.fixture(scope="module")
def model(make_dit):
    return make_dit(num_attention_heads=HEADS, attention_head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def recorded(model):
    """Outputs of every projection: name -> one tensor [B, T, H * D] per call, noisiest first; filled by `stats`."""
    return {}


@pytest.fixture(scope="module")
def stats(model, recorded, tmp_path_factory):
    """A calibration, watched by hooks of this test."""
    hooks = []
    for block in BLOCKS:
        for operand in OPERANDS:
            name = f"{block}.attn1.{operand}"
            recorded[name] = []

            def keep(module, args, y, name=name):
                recorded[name].append(y.clone())

            projection = model.get_submodule(f"{block}.attn1.to_{operand}")
            hooks.append(projection.register_forward_hook(keep))
    out = tmp_path_factory.mktemp("attention") / "stats"
    stats = calibrate(model, out, **SMALL)
    for hook in hooks:
        hook.remove()
    return stats


@pytest.fixture(scope="module")
def without(model, tmp_path_factory):
    """Statistics of the same run without Q, K and V."""
    out = tmp_path_factory.mktemp("attention") / "without"
    return calibrate(model, out, attention=False, **SMALL)


def test_ranges_of_the_operands_are_those_recorded_by_hand(stats, recorded):
    for name, calls in recorded.items():
        assert len(calls) == 3
        low, high = stats.ranges(name)
        assert torch.equal(low, torch.stack([y.flatten(0, 1).amin(0) for y in calls]))
        assert torch.equal(high, torch.stack([y.flatten(0, 1).amax(0) for y in calls]))


def test_without_them_all_other_statistics_are_the_same(stats, without):
    assert (stats.has_attention, without.has_attention) == (True, False)
    for call in range(3):
        name = f"merged/transformer/call_{call:04d}.safetensors"
        full, bare = load_file(stats.folder / name), load_file(without.folder / name)
        operands = {f"{b}.attn1.{o}.{e}" for b in BLOCKS for o in OPERANDS for e in ("min", "max")}
        assert set(full) - set(bare) == operands
        assert all(torch.equal(tensor, full[key]) for key, tensor in bare.items())


def test_statistics_without_them_serve_everything_else(model, stats, without):
    for recipe in (
        Recipe("smoothquant", activations="static"),
        Recipe("htg", activations="static", attention="none"),
        Recipe("linear", attention="int8"),
    ):
        ours = convert(model, recipe, without, quiet=True).state_dict()
        same = convert(model, recipe, stats, quiet=True).state_dict()
        assert all(torch.equal(tensor, same[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("linear", attention="bf16", attention_scales="static"),
        Recipe("htg", activations="static"),
    ],
)
def test_static_scales_without_them_say_what_to_run(model, without, recipe, tmp_path):
    with pytest.raises(
        StatisticsError,
        match="no ranges of Q, K and V; run `ditq calibrate MODEL --out NEW_FOLDER`",
    ):
        convert(model, recipe, without, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def absmax_of_heads(calls):
    return torch.stack(calls).unflatten(-1, (HEADS, HEAD_DIM)).abs().amax((0, 1, 2, 4))


@pytest.mark.parametrize("values", ["int8", "bf16"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_static_scales_are_those_of_the_folded_operands(model, stats, recorded, method, values):
    """V as the attention sees it: (V - z) / s of the output projection's transform, from the tensors themselves."""
    only = METHODS[method].static_call
    calls = slice(None) if only is None else slice(only, only + 1)
    plan = make_plan(
        model, method=method, attention=values, attention_scales="static", search=False
    )
    packed = convert(model, plan, stats, quiet=True)
    for block in BLOCKS:
        core = packed.get_submodule(f"{block}.attn1.core")
        table = FAMILY.block_tables(model)[block]
        linears = block_linears(model.get_submodule(block), table)
        part = plan.part(block)
        sites = site_data(table, block, linears, part, stats)
        folded = decide(table, linears, part, sites).sites.get("o_proj")
        for operand in OPERANDS if values == "int8" else OPERANDS[:2]:
            tensors = [y.double() for y in recorded[f"{block}.attn1.{operand}"][calls]]
            if operand == "v" and folded is not None:
                shift = 0 if folded.shift is None else folded.shift[0]
                smooth = 1 if folded.smooth is None else folded.smooth
                tensors = [(y - shift) / smooth for y in tensors]
            expected = absmax_of_heads(tensors) / 127
            scale = getattr(core, f"{operand}_scale")
            torch.testing.assert_close(scale.double(), expected, rtol=2.0**-22, atol=0)
        assert (method in ("linear", "meta")) == (folded is None)
    assert hasattr(core, "v_scale") == (values == "int8")


@pytest.mark.parametrize("values", ["int8", "bf16"])
@pytest.mark.parametrize("scales", ["token", "static"])
def test_a_whole_model_survives_the_disk_and_stays_close(
    model, stats, inputs, values, scales, tmp_path
):
    recipe = Recipe("smoothquant", attention=values, attention_scales=scales)
    packed = convert(model, recipe, stats, tmp_path / "out", quiet=True)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "out")
    batch = inputs(model)
    with torch.no_grad():
        truth, output = model(**batch).sample, loaded(**batch).sample
        assert torch.equal(output, packed(**batch).sample)
        bare = convert(model, Recipe("smoothquant"), stats, quiet=True)(**batch).sample
    # about as far as the linears' own error, 40 dB: operands of 8 bits, in the residual branch of one layer in three
    assert float((output - truth).norm() / truth.norm()) < 0.03
    assert not torch.equal(output, bare)
    report = ditq.execution_report(loaded)
    assert report.totals["integer_attentions"] == 2
    provenance = loaded.config.quantization_config.recipe
    (kept,) = provenance["plan"]["attention"].values()
    assert (kept["values"], kept.get("scales", "token")) == (values, scales)


def formats(model, **fields):
    plans = make_plan(model, **fields).attention
    assert [plan.name for plan in plans] == [f"{block}.attn1" for block in BLOCKS]
    return [plan.format for plan in plans], [plan.reason for plan in plans]


def test_what_is_planned(model):
    static = {"activations": "static"}
    assert formats(model)[0] == [None, None]
    assert formats(model, attention="bf16")[0] == [AttentionFormat("bf16", "token")] * 2
    assert formats(model, method="htg", **static)[0] == [STATIC] * 2
    assert formats(model, method="htg", attention="none", **static)[0] == [None, None]
    kept, reasons = formats(model, attention="int8", keep=("*.0.attn1",), **static)
    assert kept == [None, STATIC]
    assert reasons == [
        "attention stays float by choice",
        "Q and K in int8, P and V in int8",
    ]


def test_keeping_one_attention_float(model, stats):
    recipe = Recipe("linear", attention="int8", keep=("transformer_blocks.0.attn1",))
    report = ditq.execution_report(convert(model, recipe, stats, quiet=True))
    assert [row.integer for row in report.attention] == [False, True]
    assert (
        report.totals["integer_linears"] == 12
    )  # a pattern for the attention is not one for its linears
    with pytest.raises(ValueError, match="matches none of the 15 quantized modules"):
        convert(model, Recipe("linear", keep=("transformer_blocks.0.attn1",)), quiet=True)


def test_a_head_dimension_without_a_kernel(make_dit, tmp_path, capsys):
    """Asked for by name it is refused; what a method has by default is left out, and told."""
    model = make_dit()  # 4 heads of 16
    with pytest.raises(
        ValueError,
        match=r"transformer_blocks\.0\.attn1: its head dimension is 16.*--attention none",
    ):
        convert(model, Recipe("linear", attention="int8"), out=tmp_path / "out", quiet=True)
    stats = calibrate(model, tmp_path / "stats", **SMALL)
    packed = convert(model, Recipe("ptq4dit", activations="static"), stats)
    assert packed.config.quantization_config.scheme.attention == {}
    assert (
        "transformer_blocks.0.attn1: its attention stays float: its head" in capsys.readouterr().err
    )


def test_the_v_fold_passes_quantized_probabilities_normalized_by_their_sum():
    """P3: rows of codes over their sum add up to one, so shift and factor pass through them as through softmax."""
    generator = torch.Generator().manual_seed(0)
    q, keys = (
        torch.randint(-127, 128, (1, HEADS, 24, HEAD_DIM), generator=generator, dtype=torch.int8)
        for _ in range(2)
    )
    step = torch.full((1,), 0.012)
    p = reference._unnormalized_probabilities(q, keys, step, step, HEAD_DIM**-0.5, None)
    codes = (255 * p.double()).round()
    probability = codes / codes.sum(3, keepdim=True)
    v = torch.randn(1, HEADS, 24, HEAD_DIM, generator=generator, dtype=torch.float64) + 3
    z, u = torch.randn(2, HEADS, 1, HEAD_DIM, generator=generator, dtype=torch.float64).exp()
    folded, dequantized = probability @ ((v - z) * u), (probability @ v - z) * u
    assert float((folded - dequantized).abs().max() / dequantized.abs().max()) < 1e-12
    raw = (codes / 255) @ ((v - z) * u), ((codes / 255) @ v - z) * u  # without the sum it does not
    assert float((raw[0] - raw[1]).abs().max()) > 0.1


def test_the_op_is_the_formula_of_codes_over_their_sum():
    """O = s_v * sum_j v_j (q_vj - z_v) / sum_j v_j, the codes v summed as int64."""
    generator = torch.Generator().manual_seed(1)
    q, keys, v = (
        torch.randint(-128, 128, (2, HEADS, 17, HEAD_DIM), generator=generator, dtype=torch.int8)
        for _ in range(3)
    )
    q_scale, v_scale = torch.tensor([0.01, 0.02]), torch.tensor([0.5, 0.25])
    zero = torch.tensor([-5, 90], dtype=torch.int32)
    o = k.attention_qk_int8_pv_int8(
        q, keys, v, q_scale, q_scale, v_scale, v_zero_point=zero, softmax_scale=HEAD_DIM**-0.5
    )
    logits = (q.long() @ keys.long().mT).double() * q_scale.double().square()[:, None, None]
    p = (logits - logits.amax(3, keepdim=True)).mul(HEAD_DIM**-0.5).exp()
    codes = (255 * p).round().long()
    assert bool((codes.amax(3) == 255).all())
    total = codes @ (v.long() - zero[:, None, None])
    expected = total.double() * v_scale.double()[:, None, None] / codes.sum(3, keepdim=True)
    # two fp32 roundings where the codes agree; an fp32 logit may move a code by one across a tie
    near = ((255 * p).frac() - 0.5).abs().amin(3, keepdim=True) < 1e-3
    error = ((o - expected).abs() / expected.abs().amax()).masked_fill(near, 0)
    assert float(error.max()) < 2.0**-22
    assert float(near.double().mean()) < 0.2
