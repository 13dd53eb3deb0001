"""Quantized attention between stock projections: exactly the op, near fp64, and nothing dropped."""

import copy
import math
from collections import Counter

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
from torch import nn

import ditq_kernels as k
from ditq_bench.launches import Launches
from ditq_runtime import CheckpointError
from ditq_runtime.attention.install import install
from ditq_runtime.attention.processor import QuantAttnProcessor, key_mask_of
from ditq_runtime.format.attention import AttentionFormat

HEADS, HEAD_DIM, TOKENS, IMAGES = 2, 32, 40, 3
FORMATS = [AttentionFormat(v, s) for v in ("int8", "bf16") for s in ("token", "static")]
IDS = [f"{f.values}_{f.scales}" for f in FORMATS]
OPERANDS = ("q", "k", "v")


def build(**changes):
    """A module with one stock attention, `attn`, whose logits deviate by about 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"query_dim": 64, "heads": HEADS, "dim_head": HEAD_DIM, "bias": True, **changes}
        model = nn.ModuleDict({"attn": Attention(**options), "other": Attention(**options)})
        for projection in ("to_q", "to_k", "to_v"):
            nn.init.normal_(getattr(model["attn"], projection).weight, std=0.13)
    return model.eval().requires_grad_(False)


def operands(attn, x, source=None):
    """Q, K, V [B, T, H, D] of the float projections."""
    source = x if source is None else source
    inputs = zip((attn.to_q, attn.to_k, attn.to_v), (x, source, source), strict=True)
    return {
        name: linear(y).unflatten(-1, (HEADS, HEAD_DIM))
        for name, (linear, y) in zip(OPERANDS, inputs, strict=True)
    }


def quantized(model, attention_format, x, source=None):
    """A copy that runs quantized, with per-head scales of the largest operand where they are static."""
    model = copy.deepcopy(model)
    install(model, "attn", attention_format)
    core = model["attn"].core
    for name, parameter in list(core.named_parameters()):
        absmax = operands(model["attn"], x, source)[name[0]].abs().amax((0, 1, 3))
        core.register_parameter(name, nn.Parameter(absmax / 127, requires_grad=False))
        assert parameter.shape == (HEADS,)
    return model


@pytest.fixture
def x(generator):
    return torch.randn(IMAGES, TOKENS, 64, generator=generator)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


def codes_by_hand(y, dims):
    """Symmetric int8 of y [B, T, H, D], one scale for all of `dims`: codes as floats, scale."""
    scale = y.abs().amax(dims, keepdim=True) / torch.full((1,), 127.0)
    return (y * (1 / scale)).round(), scale


def by_hand(attn, attention_format, x, key_mask=None):
    """Codes and scales of Q, K, V: per token and head, per image and head, or per head of the whole batch."""
    dims = shared_by(attention_format)
    return {name: codes_by_hand(y, dims[name]) for name, y in operands(attn, x).items()}


def shared_by(attention_format):
    """Dimensions of [B, T, H, D] that share a scale."""
    if attention_format.scales == "static":
        return dict.fromkeys(OPERANDS, (0, 1, 3))
    return {"q": (3,), "k": (3,), "v": (1, 3)}


def cost_of_codes(model, attention_format, *args, **kwargs):
    """Norm of what the codes of Q, K and int8 V should cost the stock attention's output.

    Rounding errs by up to half a step, evenly (Bennett, 1948), so the stock attention runs with that noise on them.
    Root mean square of four runs.
    """
    noise, expected = torch.Generator().manual_seed(0), model["attn"](*args, **kwargs)
    noisy = copy.deepcopy(model)["attn"]
    dims = shared_by(attention_format)
    for name in OPERANDS if attention_format.values == "int8" else OPERANDS[:2]:

        def disturb(module, inputs, y, shared=dims[name]):
            y = y.unflatten(-1, (HEADS, HEAD_DIM))
            step = y.abs().amax(shared, keepdim=True) / 127
            return (y + step * (torch.rand(y.shape, generator=noise) - 0.5)).flatten(2)

        getattr(noisy, f"to_{name}").register_forward_hook(disturb)
    errors = torch.stack([(noisy(*args, **kwargs) - expected).norm() for _ in range(4)])
    return float(errors.square().mean().sqrt())


def errs_as_its_codes(got, model, attention_format, *args, rounding=0.0, **kwargs):
    """Whether an output differs from the stock one as codes, and the norm of other roundings, let it: by no more than
    sqrt(2) either way.

    Errors add in energy, so that sqrt(2) leaves the probabilities' codes and bf16 values as much as all the others; the
    lower end fails without half of these.
    """
    expected = math.hypot(cost_of_codes(model, attention_format, *args, **kwargs), rounding)
    error = float((got.float() - model["attn"](*args, **kwargs)).norm())
    return 0.5**0.5 < error / expected < 2**0.5


@pytest.mark.parametrize("attention_format", FORMATS, ids=IDS)
def test_it_is_the_op_on_codes_made_by_hand(attention_format, x):
    model = quantized(build(), attention_format, x)
    attn = model["attn"]
    hand = by_hand(attn, attention_format, x)
    q, keys, v = (hand[name][0].to(torch.int8).transpose(1, 2) for name in OPERANDS)
    shapes = {"token": lambda s: s[..., 0].transpose(1, 2).contiguous(), "static": torch.flatten}
    q_scale, k_scale = (shapes[attention_format.scales](hand[name][1]) for name in "qk")
    softmax_scale = HEAD_DIM**-0.5
    if attention_format.values == "int8":
        v_scale = hand["v"][1].flatten(1)[:, :HEADS].squeeze(0).contiguous()
        out = k.attention_qk_int8_pv_int8(
            q, keys, v, q_scale, k_scale, v_scale, softmax_scale=softmax_scale
        )
    else:
        values = operands(attn, x)["v"].bfloat16().transpose(1, 2)
        out = k.attention_qk_int8_pv_bf16(
            q, keys, values, q_scale, k_scale, softmax_scale=softmax_scale
        )
    expected = attn.to_out[0](out.transpose(1, 2).flatten(2))
    assert torch.equal(attn(x), expected)


@pytest.mark.parametrize("attention_format", FORMATS[1::2], ids=IDS[1::2])
def test_static_scales_launch_one_op_for_each_operand(attention_format, x):
    """And nothing of torch's: no reciprocals, no constants; bf16 values are the projection's own here."""
    core = quantized(build(), attention_format, x)["attn"].core
    query, key, value = torch.randn(3, IMAGES, TOKENS, HEADS, HEAD_DIM).bfloat16()
    with Launches() as counted:
        core(query, key, value)
    assert counted.ops == Counter(f"ditq.{op}" for op in attention_format.ops)


@pytest.mark.parametrize("attention_format", FORMATS, ids=IDS)
def test_near_fp64_attention_on_the_dequantized_operands(attention_format, x):
    """The bars of the ops: 1 % with int8 probabilities, 0.3 % with bf16."""
    model = quantized(build(), attention_format, x)
    attn = model["attn"]
    attn.to_out[0].weight.copy_(torch.eye(64))
    attn.to_out[0].bias.zero_()
    real = {
        n: (c.double() * s.double()) for n, (c, s) in by_hand(attn, attention_format, x).items()
    }
    if attention_format.values == "bf16":
        real["v"] = operands(attn, x)["v"].bfloat16().double()
    logits = torch.einsum("bqhd,bkhd->bhqk", real["q"], real["k"]) * HEAD_DIM**-0.5
    assert 0.5 < float(logits.std()) < 2
    expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(3), real["v"]).flatten(2)
    error = float((attn(x) - expected).norm() / expected.norm())
    assert error < {"int8": 0.01, "bf16": 0.003}[attention_format.values]


def test_the_softmax_scale_is_the_modules(x):
    model = build(scale_qk=False)  # logits are not divided: stock runs another processor then
    form = AttentionFormat("bf16", "token")
    got = quantized(model, form, x)["attn"](x)
    assert errs_as_its_codes(got, model, form, x)
    model["attn"].scale = HEAD_DIM**-0.5
    assert not errs_as_its_codes(got, model, form, x)


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("attention_format", FORMATS, ids=IDS)
def test_an_image_does_not_depend_on_its_batch(attention_format, x):
    attn = quantized(build(), attention_format, x)["attn"]
    x = x * torch.tensor([1.0, 0.01, 1.0])[:, None, None]
    together = attn(x)
    for image in range(IMAGES):
        assert torch.equal(attn(x[image : image + 1]), together[image : image + 1])


@pytest.mark.parametrize("attention_format", FORMATS, ids=IDS)
def test_only_the_module_that_was_asked_for_changes(attention_format, x):
    model = build()
    expected = model["other"](x)
    model = quantized(model, attention_format, x)
    assert type(model["attn"].processor) is QuantAttnProcessor
    assert type(model["other"].processor) is AttnProcessor2_0
    assert torch.equal(model["other"](x), expected)
    stored = {name for name in model.state_dict() if "core" in name}
    assert stored == {f"attn.core.{name}" for name in attention_format.tensors(HEADS)}


@pytest.mark.parametrize("values", ["int8", "bf16"])
@pytest.mark.parametrize("dims", [2, 3])
def test_masked_keys_do_not_count(values, dims, x, generator):
    """As stock attention with the same bool mask; a mask per image, keys that are masked are anything."""
    model = build()
    mask = torch.rand(IMAGES, TOKENS, generator=generator) < 0.6
    mask[:, 0] = True
    attn = quantized(model, AttentionFormat(values, "static"), x)["attn"]
    mask_as_given = mask if dims == 2 else mask[:, None]
    got = attn(x, attention_mask=mask_as_given)
    assert errs_as_its_codes(got, model, AttentionFormat(values, "static"), x, attention_mask=mask)
    other = torch.where(mask[..., None], x, torch.randn(x.shape, generator=generator))
    for image in range(IMAGES):
        kept = mask[image]  # rows of the queries that both inputs share
        again = attn(other, attention_mask=mask_as_given)
        assert torch.equal(got[image, kept], again[image, kept])


@pytest.mark.parametrize(
    ("mask", "came"),
    [
        (torch.zeros(IMAGES, 1, TOKENS).int(), r"got \[3, 1, 40\] torch.int32"),
        (torch.zeros(IMAGES, TOKENS, TOKENS), r"got \[3, 40, 40\] torch.float32"),
        (torch.ones(IMAGES, TOKENS, TOKENS).bool(), r"got \[3, 40, 40\] torch.bool"),
        (torch.ones(1, TOKENS).bool(), r"got \[1, 40\] torch.bool"),
    ],
    ids=["integers", "bias per query", "per query", "shared"],
)
def test_other_masks_are_refused_and_not_dropped(mask, came, x):
    attn = quantized(build(), AttentionFormat("int8", "token"), x)["attn"]
    with pytest.raises(
        NotImplementedError, match=rf"attention_mask must be \[3, 40\], bool or a bias.*{came}"
    ):
        attn(x, attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_bias_of_masked_keys_is_its_mask(dims, dtype, generator):
    """As PixArt makes it; exp(-9984) is 0 in fp32."""
    mask = torch.rand(IMAGES, TOKENS, generator=generator) < 0.6
    mask[:, 0] = True
    bias = (1 - mask.to(dtype)) * -10000.0
    got = key_mask_of(bias if dims == 2 else bias[:, None], IMAGES, TOKENS)
    assert torch.equal(got, mask)
    infinite = torch.zeros(IMAGES, TOKENS, dtype=dtype).masked_fill(~mask, -torch.inf)
    assert torch.equal(key_mask_of(infinite, IMAGES, TOKENS), mask)


def test_a_bias_that_masks_every_key_of_an_image_masks_none(x):
    """softmax(a - 10000) = softmax(a), as stock attention runs it; the other images keep their masks."""
    bias = torch.zeros(IMAGES, 1, TOKENS)
    bias[0], bias[1, :, 5:] = -10000.0, -10000.0
    model = build()
    form = AttentionFormat("bf16", "token")
    got = quantized(model, form, x)["attn"](x, attention_mask=bias)
    mask = bias[:, 0] == 0
    mask[0] = True  # the stock sum a - 10000 would round to 2**-11
    assert errs_as_its_codes(got, model, form, x, attention_mask=mask)


@pytest.mark.parametrize("value", [-5000.0, -1.0, 1.0, torch.nan])
def test_other_biases_are_refused_and_not_dropped(value, x):
    attn = quantized(build(), AttentionFormat("int8", "token"), x)["attn"]
    bias = torch.zeros(IMAGES, 1, TOKENS)
    bias[1, 0, 3] = value
    with pytest.raises(RuntimeError, match=r"must be 0 \(attended\) or at most -9984 \(masked\)"):
        attn(x, attention_mask=bias)


def test_masked_values_have_no_say_in_the_scale(x):
    """A padded token a thousand times larger would leave the others one code."""
    attn = quantized(build(), AttentionFormat("int8", "token"), x)["attn"]
    mask = torch.arange(TOKENS).expand(IMAGES, TOKENS) < TOKENS - 1
    expected = attn(x, attention_mask=mask)
    x = x.clone()
    x[:, -1] *= 1000
    assert torch.equal(attn(x, attention_mask=mask)[:, :-1], expected[:, :-1])


def test_a_key_mask_is_contiguous_as_the_op_needs_it():
    mask = torch.ones(TOKENS, IMAGES).bool().t()
    assert key_mask_of(mask, IMAGES, TOKENS).is_contiguous()
    assert key_mask_of(None, IMAGES, TOKENS) is None


@pytest.mark.parametrize("attention_format", FORMATS, ids=IDS)
def test_cross_attention(attention_format, x, generator):
    model = build(cross_attention_dim=64)
    source = torch.randn(IMAGES, 9, 64, generator=generator)
    mask = torch.arange(9).expand(IMAGES, 9) < 7
    options = {"encoder_hidden_states": source, "attention_mask": mask}
    attn = quantized(model, attention_format, x, source)["attn"]
    got = attn(x, **options)
    assert errs_as_its_codes(got, model, attention_format, x, **options)
    assert not torch.equal(got, attn(x, encoder_hidden_states=source))


def test_upcasting_and_dropout_ask_for_nothing_more(x):
    plain = quantized(build(), AttentionFormat("int8", "token"), x)["attn"]
    attn = quantized(build(upcast_attention=True, dropout=0.5), AttentionFormat("int8", "token"), x)
    assert torch.equal(attn["attn"](x), plain(x))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        dropped = attn["attn"].train()(x)  # diffusers drops outputs, not probabilities
    assert 0.4 < float((dropped == 0).float().mean()) < 0.6


def test_images_are_refused(x):
    attn = quantized(build(), AttentionFormat("int8", "token"), x)["attn"]
    with pytest.raises(NotImplementedError, match=r"must be \[B, T, K\], got \[1, 64, 4, 4\]"):
        attn(torch.zeros(1, 64, 4, 4))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"norm_num_groups": 4}, "its group_norm is GroupNorm"),
        ({"spatial_norm_dim": 4}, "its spatial_norm is SpatialNorm"),
        ({"cross_attention_norm": "layer_norm"}, "its norm_cross is LayerNorm"),
        ({"qk_norm": "rms_norm_across_heads", "kv_heads": 2}, r"its norm_q is RMSNorm over \[64\]"),
        ({"qk_norm": "l2"}, "its norm_q is LpNorm"),
        ({"processor": SlicedAttnProcessor(1)}, "its processor is a SlicedAttnProcessor"),
        ({"added_kv_proj_dim": 64}, "its added_kv_proj_dim is 64"),
        ({"residual_connection": True}, "its residual_connection is True"),
        ({"rescale_output_factor": 2.0}, "its rescale_output_factor is 2.0"),
        ({"is_causal": True}, "its is_causal is True"),
        ({"pre_only": True}, "its pre_only is True"),
        ({"kv_heads": 1}, "it has fewer key heads than query heads"),
        ({"dim_head": 16, "heads": 4}, r"its head dimension is 16, .* \(32, 64, 72, 88, 96, 128\)"),
    ],
)
def test_what_it_would_have_to_drop_is_refused(changes, sentence):
    with pytest.raises(CheckpointError, match=rf"^attn: {sentence}.*--attention none"):
        install(build(**changes), "attn", FORMATS[0])


def test_other_modules_are_refused():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(64, 2)})
    with pytest.raises(
        CheckpointError, match="attn: a MultiheadAttention is not diffusers' Attention"
    ):
        install(model, "attn", FORMATS[0])
    with pytest.raises(CheckpointError, match="gone: listed in the scheme, but the model has no"):
        install(model, "gone", FORMATS[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_scales_survive_a_cast(dtype, x):
    attn = quantized(build(), AttentionFormat("int8", "static"), x)["attn"]
    before = {name: scale.clone() for name, scale in attn.core.named_parameters()}
    attn.to(dtype)
    assert len(before) == 3
    for name, scale in attn.core.named_parameters():
        assert scale.dtype == torch.float32
        assert torch.equal(scale, before[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention_format", FORMATS, ids=IDS)
def test_half_precision_comes_and_goes(attention_format, dtype, x):
    """Rounding of operands, projections and output costs what it costs the stock attention, on top of the codes."""
    stock, half = build(), build().to(dtype)["attn"](x.to(dtype))
    out = quantized(stock, attention_format, x).to(dtype)["attn"](x.to(dtype))
    assert out.dtype == dtype
    rounding = float((half.float() - stock["attn"](x)).norm())
    assert errs_as_its_codes(out, stock, attention_format, x, rounding=rounding)


def test_values_past_a_static_range_clip(x):
    """Calibrated on half the range: the codes end at the int8 range and do not wrap."""
    attn = quantized(build(), AttentionFormat("int8", "static"), x / 2)["attn"]
    wide = quantized(build(), AttentionFormat("int8", "static"), x)["attn"]
    error = float((attn(x) - wide(x)).norm() / wide(x).norm())
    assert 0.001 < error < 0.3  # a wrapped sign would cost more than the value itself


@pytest.mark.parametrize(("field", "value"), [("values", "fp8"), ("scales", "head")])
def test_formats_that_no_op_runs_are_refused(field, value):
    with pytest.raises(CheckpointError, match=f"{field} must be one of .* got '{value}'"):
        AttentionFormat(**{"values": "int8", "scales": "token", field: value})


def test_what_a_format_stores_and_runs():
    assert [f.ops for f in FORMATS] == [
        (*["quantize_heads"] * 3, "attention_qk_int8_pv_int8"),
        (*["quantize_heads"] * 3, "attention_qk_int8_pv_int8"),
        (*["quantize_heads"] * 2, "attention_qk_int8_pv_bf16"),
        (*["quantize_heads"] * 2, "attention_qk_int8_pv_bf16"),
    ]
    scale = (torch.float32, (6,))
    assert [f.tensors(6) for f in FORMATS] == [
        {}, {"q_scale": scale, "k_scale": scale, "v_scale": scale},
        {}, {"q_scale": scale, "k_scale": scale},
    ]  # fmt: skip
    assert math.prod(len(f.tensors(6)) for f in FORMATS[1::2]) == 6
