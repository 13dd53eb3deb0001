"""Quantized attention in every family with a table: what is recorded, stored, runs and is refused."""

import copy
import functools
import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention

import ditq_kernels as k
from ditq_converters import Recipe, calibrate, convert
from ditq_converters.calibrate.recorder import Recorder
from ditq_converters.calibrate.rows import RowChoice
from ditq_converters.plan.make import make_plan
from ditq_runtime import DitqConfig, FallbackError, execution_report
from ditq_runtime.families import ValueRows, family_of
from ditq_runtime.format.attention import AttentionFormat

HEADS, HEAD_DIM = 2, 32
IN_PROCESSOR = "diffusers.models.attention_processor.F.scaled_dot_product_attention"
IN_DISPATCH = "diffusers.models.attention_dispatch.torch.nn.functional.scaled_dot_product_attention"
# case -> attentions in the order they run, and where their stock processor finds the product
CASES = {
    "pixart-attention": (
        [f"transformer_blocks.{block}.{name}" for block in "01" for name in ("attn1", "attn2")],
        IN_PROCESSOR,
    ),
    "sd3-attention": ([f"transformer_blocks.{block}.attn" for block in "01"], IN_PROCESSOR),
    "sd3.5-attention": (
        [f"transformer_blocks.{name}" for name in ("0.attn", "0.attn2", "1.attn")],
        IN_PROCESSOR,
    ),
    "flux-attention": (
        [
            f"{kind}.{block}.attn"
            for kind in ("transformer_blocks", "single_transformer_blocks")
            for block in "01"
        ],
        IN_DISPATCH,
    ),
}
FORMATS = [AttentionFormat(v, s) for v in ("int8", "bf16") for s in ("token", "static")]
IDS = [f"{f.values}_{f.scales}" for f in FORMATS]


@pytest.fixture(scope="module")
def case(make_case, embeddings, tmp_path_factory):
    """Name -> model, batch, family, attentions, statistics; made at the first request."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model, inputs = make_case(name)
            for key, parameter in model.named_parameters():
                if ".norm_" in key and "attn" in key:  # each norm another, far from one
                    torch.nn.init.uniform_(parameter, 0.3, 2.0)
            prompts = folder / "prompts.safetensors"
            save_file(embeddings(model), prompts)
            plan = {"steps": 2, "samples": 2, "rows": 0, "quiet": True, "prompts": prompts}
            plan |= {"height": 64, "width": 64}
            made[name] = SimpleNamespace(
                model=model,
                inputs=inputs,
                family=family_of(type(model).__name__),
                names=CASES[name][0],
                where=CASES[name][1],
                stats=calibrate(model, folder / "stats", **plan),
                packed={},
            )
        return made[name]

    return get


@pytest.fixture(scope="module")
def packed(case):
    """Name, format -> the packed model, smoothed, W8A8."""

    def get(name, f):
        made = case(name).packed
        if f not in made:
            recipe = Recipe("smoothquant", attention=f.values, attention_scales=f.scales)
            made[f] = convert(case(name).model, recipe, case(name).stats, quiet=True)
        return made[f]

    return get


@pytest.fixture(scope="module")
def cost(case, packed, cost_of_codes):
    """Name -> relative error by the codes of the linears."""

    @functools.cache
    def get(name):
        return cost_of_codes(case(name).model, packed(name, FORMATS[0]), case(name).inputs)

    return get


def relative(got, truth):
    return float((got - truth).norm() / truth.norm())


def attended(x, mask):
    """Rows [n, H * D] of x [B, H, T, D], without keys that a bias [B, H, 1, T] masks."""
    rows = x.transpose(1, 2).flatten(2)
    return rows.flatten(0, 1) if mask is None else rows[mask[:, 0, 0] == 0]


@pytest.mark.parametrize("name", CASES)
def test_ranges_are_those_of_what_the_stock_processor_hands_over(case, run, name, monkeypatch):
    """After norms and rotary embedding, all streams together; masked keys and values do not count."""
    case, calls = case(name), []

    def keep(query, key, value, attn_mask=None, **options):
        calls.append((query, key, value, attn_mask))
        return scaled_dot_product_attention(query, key, value, attn_mask, **options)

    models, visits = {"transformer": (case.model, case.family)}, []
    with Recorder(models, RowChoice(0, 0, 0), 0, 0, True, visits.append) as recorder:
        run(case.model, case.inputs)
        recorder.finish()
    monkeypatch.setattr(case.where, keep)
    run(case.model, case.inputs)
    assert case.family.attention_names(case.model) == case.names
    for attention, (query, key, value, mask) in zip(case.names, calls, strict=True):
        rows = {"q": attended(query, None), "k": attended(key, mask), "v": attended(value, mask)}
        for operand, expected in rows.items():
            low, high = visits[0].ranges[f"{attention}.{operand}"]
            assert torch.equal(low, expected.amin(0))
            assert torch.equal(high, expected.amax(0))


@pytest.mark.parametrize("name", CASES)
def test_static_scales_are_those_of_the_folded_operands(case, packed, name):
    """V as it leaves the folded projections, by the fold that the checkpoint stores; Q and K absorb nothing."""
    case, model = case(name), packed(name, AttentionFormat("int8", "static"))
    for attention in case.names:
        block, _, module = attention.rpartition(".")
        table = case.family.block_tables(case.model)[block]
        (site,) = (
            site.name
            for site in table.sites
            if isinstance(site.producer, ValueRows) and f"{module}.to_v" in site.producer.values
        )
        folds = model.get_submodule(f"{block}.ditq_sites.{site}")
        for operand in "qkv":
            low, high = (side.double() for side in case.stats.ranges(f"{attention}.{operand}"))
            if operand == "v":
                scale = folds.scale.double()[: low.shape[1]]
                assert float((scale - 1).abs().max()) > 0.01
                low, high = low / scale, high / scale
            absmax = torch.maximum(low.abs(), high.abs()).view(len(low), HEADS, HEAD_DIM)
            got = getattr(model.get_submodule(attention).core, f"{operand}_scale").double()
            torch.testing.assert_close(got, absmax.amax((0, 2)) / 127, rtol=2.0**-21, atol=0)


def codes(x, scale):
    """int8 of x [B, H, T, D] at a scale that broadcasts against it."""
    return (x * (1 / scale)).round().clamp(-128, 127)


def quantized_operands(attn, query, key, value, mask):
    """Codes and scales, made by hand, of what the stock processor of `attn` hands over."""
    stored = dict(attn.core.named_parameters())
    operands, made = {"q": query, "k": key, "v": value}, {}
    for name, x in operands.items():
        if f"{name}_scale" in stored:
            scale = stored[f"{name}_scale"][:, None, None]
        elif name == "v":
            seen = x if mask is None else x.masked_fill(~mask[:, None, :, None], 0)
            scale = seen.abs().amax((2, 3), keepdim=True) / torch.full((1,), 127.0)
        else:
            scale = x.abs().amax(3, keepdim=True) / torch.full((1,), 127.0)
        made[name] = codes(x, scale), scale
    return made


class Handed:
    """A product of the stock processor's operands: the op on codes made by hand, or fp64 on their values."""

    def __init__(self, attn, attention_format, wide):
        self.attn, self.format, self.wide = attn, attention_format, wide

    def __call__(self, query, key, value, attn_mask=None, **options):
        mask = None if attn_mask is None else (attn_mask[:, 0, 0] == 0).contiguous()
        made = quantized_operands(self.attn, query, key, value, mask)
        (q, q_scale), (keys, k_scale), (v, v_scale) = (made[name] for name in "qkv")
        if self.wide:
            if self.format.values == "bf16":
                v, v_scale = value.bfloat16(), 1.0
            logits = (q.double() * q_scale) @ (keys.double() * k_scale).mT * HEAD_DIM**-0.5
            if mask is not None:
                logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
            return (logits.softmax(3) @ (v.double() * v_scale)).float()
        rest = {"softmax_scale": HEAD_DIM**-0.5, "key_mask": mask, "out_dtype": query.dtype}
        q, keys, v = (x.to(torch.int8) for x in (q, keys, v))
        flat = (lambda s: s.flatten()) if self.format.scales == "static" else (lambda s: s[..., 0])
        q_scale, k_scale = (flat(s).contiguous() for s in (q_scale, k_scale))
        if self.format.values == "bf16":
            return k.attention_qk_int8_pv_bf16(q, keys, value.bfloat16(), q_scale, k_scale, **rest)
        v_scale = v_scale.flatten() if self.format.scales == "static" else v_scale[..., 0, 0]
        return k.attention_qk_int8_pv_int8(
            q, keys, v, q_scale, k_scale, v_scale.contiguous(), **rest
        )


def through_stock(case, model, attention_format, wide, run, monkeypatch):
    """Each quantized attention's outputs in a forward, and those of diffusers' own processor around `Handed`."""
    stock = {name: case.model.get_submodule(name).processor for name in case.names}
    pairs, hooks = [], []

    def compare(attn, args, kwargs, output, name):
        processor = attn.processor
        monkeypatch.setattr(case.where, Handed(attn, attention_format, wide))
        attn.processor = stock[name]
        expected = attn.forward(*args, **kwargs)
        attn.processor = processor
        outputs = output if isinstance(output, tuple) else (output,)
        expected = expected if isinstance(expected, tuple) else (expected,)
        pairs.append((name, outputs, expected))

    for name in case.names:
        attn = model.get_submodule(name)
        hook = lambda *seen, name=name: compare(*seen, name)  # noqa: E731
        hooks.append(attn.register_forward_hook(hook, with_kwargs=True))
    run(model, case.inputs)
    for hook in hooks:
        hook.remove()
    assert [name for name, _, _ in pairs] == case.names
    return pairs


@pytest.mark.parametrize("attention_format", FORMATS, ids=IDS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_op_between_what_diffusers_does(
    case, packed, run, name, attention_format, monkeypatch
):
    """To the bit: norms, rotary embedding, order of streams, masks and output projections are diffusers' own."""
    model = packed(name, attention_format)
    for attention, got, expected in through_stock(
        case(name), model, attention_format, False, run, monkeypatch
    ):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), attention


@pytest.mark.parametrize("attention_format", FORMATS, ids=IDS)
@pytest.mark.parametrize("name", CASES)
def test_near_fp64_attention_on_the_dequantized_operands(
    case, packed, run, name, attention_format, monkeypatch
):
    """The bars of the ops, 1 % with int8 probabilities and 0.3 % with bf16, judged before output projections."""
    model = copy.deepcopy(packed(name, attention_format))
    for attention in case(name).names:
        attn = model.get_submodule(attention)
        for output in ("to_out", "to_add_out"):
            if getattr(attn, output, None) is not None:
                kind = torch.nn.Identity()
                setattr(
                    attn, output, torch.nn.ModuleList([kind, kind]) if output == "to_out" else kind
                )
    bound = {"int8": 0.01, "bf16": 0.003}[attention_format.values]
    for attention, got, expected in through_stock(
        case(name), model, attention_format, True, run, monkeypatch
    ):
        for a, b in zip(got, expected, strict=True):
            assert relative(a, b) < bound, attention


def unclipped(model, names):
    """A copy whose static scales grow to what its attentions meet."""

    def grow(core, args):
        for operand, x in zip("qkv", args, strict=False):
            scale = getattr(core, f"{operand}_scale", None)
            if scale is None:
                continue
            for part, before in [(x, {})] if isinstance(x, torch.Tensor) else x:
                _, met = k.quantize_heads(part, **before)  # of each token: the largest over 127
                scale.data = torch.maximum(scale.data, met.amax((0, 2)))

    model = copy.deepcopy(model)
    for name in names:
        model.get_submodule(name).core.register_forward_pre_hook(grow)
    return model


@pytest.mark.parametrize("attention_format", FORMATS, ids=IDS)
@pytest.mark.parametrize("name", CASES)
def test_a_whole_model_survives_the_disk_and_stays_close(
    case, packed, run, cost, name, attention_format, tmp_path
):
    """8-bit attention, in the residual branch of one layer in three, adds at most as much energy as the linears' codes.

    Static ranges are made to hold the batch, which is another than the calibrated one.
    """
    case, model = case(name), packed(name, attention_format)
    model.save_pretrained(tmp_path)
    loaded = type(case.model).from_pretrained(tmp_path)
    truth, got = run(case.model, case.inputs), run(loaded, case.inputs)
    assert torch.equal(got, run(model, case.inputs))
    error = relative(run(unclipped(loaded, case.names), case.inputs), truth)
    assert 0.5**0.5 < error / cost(name) < 2**0.5
    report = execution_report(loaded, case.inputs)
    assert [row.name for row in report.attention] == case.names
    assert all(row.integer and row.values == attention_format.values for row in report.attention)
    assert report.totals["integer_attentions"] == len(case.names)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_costs_what_it_costs_the_float_model(
    case, packed, run, cost, name, tmp_path
):
    """Codes add their energy to what bf16 costs the float model, masks of -9984 included: no source besides."""
    case, model = case(name), packed(name, AttentionFormat("int8", "static"))
    model.save_pretrained(tmp_path)
    half = type(case.model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    narrow = {
        key: value.bfloat16()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in case.inputs.items()
    }
    truth, got = run(case.model, case.inputs), run(half, narrow)
    assert got.dtype == torch.bfloat16
    rounding = relative(run(copy.deepcopy(case.model).bfloat16(), narrow).float(), truth)
    assert 0.5**0.5 < relative(got.float(), truth) / math.hypot(rounding, cost(name)) < 2**0.5


@pytest.mark.parametrize("name", CASES)
def test_one_graph_compiles_and_is_the_same_function(case, packed, run, name):
    model = packed(name, AttentionFormat("int8", "static"))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    assert torch.equal(run(compiled, case(name).inputs), run(model, case(name).inputs))


@pytest.mark.parametrize("name", CASES)
def test_another_processor_is_a_fallback(case, packed, name):
    model = copy.deepcopy(packed(name, FORMATS[0]))
    last = case(name).names[-1]
    model.get_submodule(last).processor = case(name).model.get_submodule(last).processor
    with pytest.raises(FallbackError, match=f"{last}: the scheme promises quantized attention"):
        execution_report(model, case(name).inputs)


def test_masked_captions_do_not_count(case, packed, run):
    """PixArt's cross attention, with its own mask; a caption token that is masked may be anything."""
    case, model = case("pixart-attention"), packed("pixart-attention", FORMATS[0])
    masked = case.inputs["encoder_attention_mask"] == 0
    caption = case.inputs["encoder_hidden_states"].clone()
    caption[masked] *= 50
    changed = {**case.inputs, "encoder_hidden_states": caption}
    assert torch.equal(run(model, changed), run(model, case.inputs))
    opened = {**changed, "encoder_attention_mask": torch.ones_like(masked).long()}
    assert not torch.equal(run(model, opened), run(model, case.inputs))


@pytest.mark.parametrize("name", ["flux-attention", "sd3-attention"])
def test_what_a_joint_attention_would_have_to_drop_is_refused(case, packed, name):
    attn = packed(name, FORMATS[0]).transformer_blocks[0].attn
    image, text = torch.zeros(2, 5, 64), torch.zeros(2, 3, 64)
    per_query = torch.ones(2, 1, 8, 8).bool()
    wanted = r"must be \[2, 1, 1, 8\]" if name == "flux-attention" else "must be None"
    with pytest.raises(NotImplementedError, match=f"attention_mask of this module {wanted}, got"):
        attn(image, text, per_query)
    with pytest.raises(NotImplementedError, match="this module was given no tokens"):
        attn(image)
    with pytest.raises(NotImplementedError, match="IP-Adapters need"):
        attn.processor(attn, image, text, ip_hidden_states=[text])
    with pytest.raises(NotImplementedError, match="context parallelism needs"):
        attn.processor._parallel_config = object()
    attn.processor._parallel_config = None


def test_a_mask_over_both_streams_is_honoured(case, packed):
    """Flux's attention takes one; a masked token of either stream may be anything."""
    attn = packed("flux-attention", FORMATS[0]).transformer_blocks[0].attn
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(2, n, 64, generator=generator) for n in (5, 3))
    mask = torch.tensor([[1, 0, 1, 1, 1, 1, 1, 0], [1] * 8]).bool()[:, None, None]
    got = attn(image, text, mask)
    image[0, 4], text[0, 1] = 30.0, -30.0
    again = attn(image, text, mask)
    assert torch.equal(got[0][:, :4], again[0][:, :4])
    assert torch.equal(got[1][:, [0, 2]], again[1][:, [0, 2]])
    assert not torch.equal(attn(image, text)[0][0, :4], again[0][0, :4])


@pytest.mark.parametrize("name", ["pixart-sigma", "sd3.5", "flux-dev"])
def test_a_head_dimension_without_a_kernel_is_refused(make_case, name):
    model, _ = make_case(name)
    with pytest.raises(ValueError, match=r"its head dimension is (16|24).*--attention none"):
        convert(model, Recipe("linear", attention="int8"), quiet=True)


def test_a_family_without_a_table_is_refused():
    with torch.device("meta"):
        model = diffusers.AuraFlowTransformer2DModel(
            sample_size=16, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=64, pos_embed_max_size=64,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"AuraFlow.*its attention does not run quantized yet"):
        make_plan(model, method="linear", attention="int8")


@pytest.mark.parametrize("name", ["pixart-attention", "sd3.5-attention", "flux-attention"])
def test_quantized_as_it_loads_it_runs_what_the_converter_makes(case, run, name, tmp_path):
    case = case(name)
    case.model.save_pretrained(tmp_path)
    choice = DitqConfig(weights="w8", attention="int8")
    loaded = type(case.model).from_pretrained(tmp_path, quantization_config=choice)
    recipe = Recipe("linear", "w8", "token", attention="int8")
    converted = convert(case.model, recipe, quiet=True)
    assert torch.equal(run(loaded, case.inputs), run(converted, case.inputs))
    assert execution_report(loaded, case.inputs).totals["integer_attentions"] == len(case.names)


def test_as_it_loads_what_cannot_be_is_refused(make_case, tmp_path):
    model, _ = make_case("flux-dev")
    model.save_pretrained(tmp_path)
    choice = DitqConfig(weights="w8", attention="int8")
    with pytest.raises(ValueError, match=r"attn: its head dimension is 16.*leave attention out"):
        type(model).from_pretrained(tmp_path, quantization_config=choice)
    with pytest.raises(ValueError, match=r"attention must be one of none, int8, bf16, got 'fp8'"):
        DitqConfig(weights="w8", attention="fp8")
