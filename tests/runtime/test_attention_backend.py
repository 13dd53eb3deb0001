"""Attention backends of diffusers' dispatcher: right, of one model, and refusing what they cannot do."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

import ditq_runtime as ditq
from ditq_runtime.attention.dispatcher import BACKENDS, register_attention_backends
from ditq_runtime.report.attention import CHOSEN, NOT_LISTED

BATCH, TOKENS, HEADS, DIM = 2, 24, 3, 32


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(8, 8, 16), guidance_embeds=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def flux(flux_folder):
    config = ditq.DitqConfig(weights="w8")
    return FluxTransformer2DModel.from_pretrained(flux_folder, quantization_config=config)


def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 6, 32, generator=generator),
        "pooled_projections": torch.randn(2, 32, generator=generator),
        "timestep": torch.tensor([0.5, 0.25]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }


def run(model):
    with torch.no_grad():
        return model(**batch()).sample


def heads(seed, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, tokens, HEADS, DIM, generator=generator)


def codes(x, over):
    """fp64 values that symmetric int8 codes stand for, a scale for each slice along the other axes."""
    scale = x.double().abs().amax(over, keepdim=True) / 127
    return (x.double() / scale).round() * scale


def truth(query, key, value, values, mask=None, scale=DIM**-0.5):
    """fp64 attention on what is left of Q and of K less its mean (of V too, if int8) after quantization."""
    attended = torch.ones(key.shape[:2]) if mask is None else mask
    share = (attended / attended.sum(1, keepdim=True)).double()
    mean = torch.einsum("bk,bkhd->bhd", share, key.double())
    q, k = codes(query, 3), codes(key - mean[:, None], 3)
    shown = value if mask is None else value * mask[:, :, None, None]
    v = codes(shown, (1, 3)) if values == "int8" else value.bfloat16().double()
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)


def close(got, expected, values):
    """The bounds of the ops: 1 % with int8 P, 0.3 % with bf16 P."""
    bound = {"int8": 0.01, "bf16": 0.003}[values]
    return float((got - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize(("name", "values"), BACKENDS.items())
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_dispatcher_runs_it(name, values, scale):
    qkv = heads(0), heads(1, 40), heads(2, 40)
    got = dispatch_attention_fn(*qkv, scale=scale, backend=name)
    expected = truth(*qkv, values, scale=DIM**-0.5 if scale is None else scale)
    assert got.dtype == torch.float32
    assert close(got, expected, values)
    half = [x.bfloat16() for x in qkv]
    assert dispatch_attention_fn(*half, scale=scale, backend=name).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "values"), BACKENDS.items())
def test_what_all_keys_share_costs_nothing(name, values):
    """Ten deviations on every key: softmax ignores it, and so do the codes. Left in, one step would be ten."""
    query, key, value = heads(0), heads(1, 40), heads(2, 40)
    shared = 10 * torch.randn(1, 1, HEADS, DIM, generator=torch.Generator().manual_seed(3))
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (query, key, value))
    ).transpose(1, 2)
    plain, biased = (
        dispatch_attention_fn(query, k, value, backend=name) for k in (key, key + shared)
    )
    error = (plain - exact).norm() / exact.norm()
    assert (biased - exact).norm() / exact.norm() < 1.2 * error + 1e-5


@pytest.mark.parametrize(("name", "values"), BACKENDS.items())
def test_masks_over_keys_of_any_shape_are_honoured(name, values):
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [7]])
    qkv = (
        heads(0),
        heads(1),
        heads(2) * (1 + 9 * ~mask[:, :, None, None]),
    )  # what is masked is large
    expected = dispatch_attention_fn(*qkv, attn_mask=mask, backend=name)
    assert close(expected, truth(*qkv, values, mask), values)
    bias = torch.where(mask, 0.0, -10000.0)
    for given in (mask[:, None], mask[:, None, None], bias, bias[:, None, None]):
        assert torch.equal(dispatch_attention_fn(*qkv, attn_mask=given, backend=name), expected)
    alone = [x[1:] for x in qkv]
    shared = dispatch_attention_fn(*qkv, attn_mask=mask[1:, None, None], backend=name)[1:]
    assert torch.equal(shared, dispatch_attention_fn(*alone, attn_mask=mask[1:], backend=name))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"dropout_p": 0.1}, "wants dropout"),
        ({"is_causal": True}, "wants a causal mask"),
        ({"enable_gqa": True}, "wants fewer key heads"),
        ({"parallel_config": object()}, "wants tokens split over devices"),
        (
            {"attn_mask": torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)},
            "a mask must be [2, 1, 1, 24]",
        ),
        ({"attn_mask": torch.ones(2, HEADS, 1, TOKENS, dtype=torch.bool)}, "a mask must be"),
    ],
)
def test_what_it_cannot_do_it_refuses(arguments, what):
    with pytest.raises(NotImplementedError) as caught:
        dispatch_attention_fn(heads(0), heads(1), heads(2), backend="ditq_int8", **arguments)
    assert what in str(caught.value)
    assert "configure(attention='native')" in str(caught.value)


def test_registering_twice_changes_nothing():
    before = list(AttentionBackendName)
    register_attention_backends()
    assert list(AttentionBackendName) == before
    assert {"ditq_int8", "ditq_bf16"} <= {member.value for member in before}
    assert AttentionBackendName("ditq_int8").name == "DITQ_INT8"


@pytest.mark.parametrize("values", ["int8", "bf16"])
def test_configure_chooses_for_one_model_only(flux, flux_folder, values):
    other = FluxTransformer2DModel.from_pretrained(flux_folder)
    expected, native = run(other), run(flux)
    active = _AttentionBackendRegistry.get_active_backend()
    ditq.configure(flux, attention=values)
    quantized = run(flux)
    assert torch.equal(run(other), expected)
    assert _AttentionBackendRegistry.get_active_backend() == active
    assert not torch.equal(quantized, native)
    assert (quantized - native).norm() < 0.02 * native.norm()
    rows = ditq.execution_report(flux, batch()).attention
    assert [(row.scores, row.values, row.note) for row in rows] == [("int8", values, CHOSEN)] * 2
    ditq.configure(flux)  # auto: as it is
    assert torch.equal(run(flux), quantized)
    ditq.configure(flux, attention="native")
    assert torch.equal(run(flux), native)
    assert [row.note for row in ditq.execution_report(flux, batch()).attention] == [NOT_LISTED] * 2


def test_families_without_a_table_have_it_too(tmp_path):
    torch.manual_seed(0)
    WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=64, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
    ).save_pretrained(tmp_path)  # fmt: skip
    config = ditq.DitqConfig(weights="w8")
    model = WanTransformer3DModel.from_pretrained(tmp_path, quantization_config=config)
    inputs = {
        "hidden_states": torch.randn(1, 4, 1, 8, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
    }
    assert ditq.execution_report(model, inputs).attention == []
    ditq.configure(model, attention="bf16")
    rows = ditq.execution_report(model, inputs).attention
    assert [(row.name, row.integer) for row in rows] == [
        ("blocks.0.attn1", True),
        ("blocks.0.attn2", True),
    ]


def test_what_the_checkpoint_quantizes_stays_so(flux_folder):
    config = ditq.DitqConfig(weights="w8", attention="int8")
    model = FluxTransformer2DModel.from_pretrained(flux_folder, quantization_config=config)
    expected = run(model)
    with pytest.raises(ValueError, match="no attention of FluxTransformer2DModel asks"):
        ditq.configure(model, attention="bf16")
    ditq.configure(model, attention="native")
    assert torch.equal(run(model), expected)


def test_models_that_do_not_ask_the_dispatcher_are_refused(packed_folder, load):
    model = load(packed_folder("w8_token"))
    with pytest.raises(
        ValueError, match=r"convert the model with --attention int8, or take attention='auto'"
    ):
        ditq.configure(model, attention="int8")
    with pytest.raises(
        ValueError, match="attention must be one of auto, native, int8, bf16, got 'sage'"
    ):
        ditq.configure(model, attention="sage")


def test_it_compiles_into_one_graph(flux):
    ditq.configure(flux, attention="int8")
    expected = run(flux)
    graphed = torch.compile(flux, fullgraph=True, backend="eager")
    assert torch.equal(run(graphed), expected)
