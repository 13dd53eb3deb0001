"""The ops as torch sees them: schemas, fakes, strides, compilation."""

import pytest
import torch

import ditq_kernels as k
from ditq_kernels.ops import dispatch


def arguments(op, num_tokens=5):
    """Positional arguments of each `ditq::` op, on K = 64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, 64, generator=generator)
    w = k.quantize_weight_w4p(torch.randn(24, 64, generator=generator), 32)
    q, scale = k.quantize_per_token(x)
    zero_point, bias = torch.tensor([3], dtype=torch.int32), torch.randn(24, generator=generator)
    int4 = (w.group_scale, w.group_offset, w.scale)
    keys = torch.randint(-128, 128, (2, 3, 7, 64), generator=generator, dtype=torch.int8)
    queries, values = keys[:, :, :num_tokens], keys.bfloat16()
    steps, mask = (torch.rand(3) / 99, torch.rand(2, 3, 7) / 99), torch.ones(2, 7).bool()
    return {
        "quantize_per_token": (x.bfloat16(), torch.rand(64), x[:1].clone(), None, True),
        "quantize_static": (x, torch.tensor([0.02]), zero_point, None, x[:1].clone(), None),
        "quantize_heads": (
            keys[:, :num_tokens].bfloat16(), torch.rand(64), 1e-6, x[:3, :32].clone(), x[:3, :32].clone(), True,
            torch.rand(2, 7, 64), None,
        ),
        "gemm_w8a8": (
            q, w.expand(), scale, w.scale, bias, zero_point, w.weight_sum(), torch.bfloat16,
        ),
        "lora_down": (q, x.bfloat16()[:3], scale, zero_point),
        "gemm_w4a8": (q, w.packed, scale, *int4, None, None, None, torch.float32),
        "linear_w8": (x, w.expand(), w.scale, bias, torch.float16),
        "linear_w4": (x, w.packed, *int4, None, torch.float32),
        "attention_qk_int8_pv_int8": (
            queries, keys, keys, *steps, steps[0], zero_point, 0.1, mask, torch.bfloat16,
        ),
        "attention_qk_int8_pv_bf16": (queries, keys, values, *steps, 0.1, None, torch.float32),
    }[op]  # fmt: skip


ROW_OPS = [
    "quantize_per_token", "quantize_static", "gemm_w8a8", "gemm_w4a8", "lora_down", "linear_w8", "linear_w4",
]  # fmt: skip
ATTENTION = ["attention_qk_int8_pv_int8", "attention_qk_int8_pv_bf16"]
OPS = [*ROW_OPS, *ATTENTION, "quantize_heads"]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    torch.library.opcheck(getattr(dispatch, op).overload, arguments(op))


def test_opcheck_of_a_scale_for_each_head():
    x = torch.randn(5, 64)
    torch.library.opcheck(dispatch.quantize_static.overload, (x, torch.rand(4) / 99, None, None))


@pytest.mark.parametrize("op", ["gemm_w8a8", "gemm_w4a8"])
def test_opcheck_of_every_stage(op):
    arguments_ = list(arguments(op, 6))
    bias = torch.randn(3, 24)
    arguments_[4 if op == "gemm_w8a8" else 6] = bias
    stages = (torch.tensor([2, 0]), torch.randn(6, 5).bfloat16(), torch.randn(24, 5).bfloat16())
    torch.library.opcheck(getattr(dispatch, op).overload, (*arguments_, *stages))


@pytest.mark.parametrize("op", ATTENTION)
def test_opcheck_of_attention_codes(op):
    codes = (torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32), torch.rand(192))
    torch.library.opcheck(
        getattr(dispatch, op).overload, (*arguments(op)[:-1], torch.float32, *codes)
    )


@pytest.mark.parametrize("op", ROW_OPS)
def test_fakes_match_on_strided_rows(op):
    first, *rest = arguments(op)
    wide = torch.zeros(5, 100, dtype=first.dtype)
    wide[:, 8:72] = first
    torch.library.opcheck(
        getattr(dispatch, op).overload,
        (wide[:, 8:72], *rest),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("op", OPS)
def test_public_ops_trace_without_graph_breaks(op):
    captured = []

    def backend(module, _):
        captured.append(module)
        return module.forward

    first, *rest = arguments(op)
    *rest, last = rest
    keywords = {"out_dtype": last} if isinstance(last, torch.dtype) else {}
    positional = rest if keywords else [*rest, last]
    if op == "quantize_heads":
        weight, eps, cos, sin, interleaved, shift, scale = positional
        positional = [weight, cos, sin]
        keywords = {"eps": eps, "interleaved": interleaved, "shift": shift, "scale": scale}
    elif op.startswith("quantize"):
        names = ("group_shift", "group_index", "asymmetric")[: 3 if op.endswith("token") else 2]
        keywords |= zip(names, positional[-len(names) :], strict=True)
        positional = positional[: -len(names)]
    if op == "lora_down":
        *positional, keywords["zero_point"] = positional
    if op.startswith("attention"):
        *positional, softmax_scale, key_mask = positional
        keywords |= {"softmax_scale": softmax_scale, "key_mask": key_mask}
    if op == "attention_qk_int8_pv_int8":
        *positional, keywords["v_zero_point"] = positional
    if op.startswith("gemm"):
        *positional, zero_point, weight_sum = positional
        keywords |= {"zero_point": zero_point, "weight_sum": weight_sum}
    public = getattr(k, op)
    compiled = torch.compile(public, backend=backend, fullgraph=True)
    got, expected = compiled(first, *positional, **keywords), public(first, *positional, **keywords)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert len(captured) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("op", ATTENTION)
def test_attention_takes_and_gives_tokens_of_heads(op):
    """[B, T, H, D] memory in and out."""
    q, keys, v, *rest = arguments(op)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, keys, v)]
    torch.library.opcheck(getattr(dispatch, op).overload, (*turned, *rest))
    y = getattr(dispatch, op)(*turned, *rest)
    assert torch.equal(y, getattr(dispatch, op)(q, keys, v, *rest))
    assert y.transpose(1, 2).is_contiguous()


def test_kernels_see_the_caller_s_tensor_object(monkeypatch):
    """The cache of prepared int4 weights is keyed on it."""
    seen = []
    monkeypatch.setattr(
        dispatch.linear, "linear_w4", lambda x, packed, *rest: seen.append(packed) or x + 0
    )
    x, *parts, bias, out_dtype = arguments("linear_w4")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            k.linear_w4(x, *parts, bias, out_dtype=out_dtype)
    assert all(packed is parts[0] for packed in seen)
    assert len(seen) == 2
