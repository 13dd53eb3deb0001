"""The definition of attention: by hand, against fp64, through the quantizers."""

import math

import pytest
import torch

import ditq_kernels as k
from ditq_kernels.reference import attention as reference

HEAD_DIMS = (32, 64, 72, 88, 96, 128)


def int8_arguments(p):
    names = ("q", "k", "v", "q_scale", "k_scale", "v_scale", "v_zero_point")
    return [p[n] for n in (*names, "softmax_scale", "key_mask")]


def bf16_arguments(p):
    return [p[n] for n in ("q", "k", "values", "q_scale", "k_scale", "softmax_scale", "key_mask")]


def spread(scale):
    """A scale of any kind against [B, H, T, 1], in fp64."""
    return (scale[..., None] if scale.dim() == 3 else scale[:, None, None]).double()


def logits_of(p):
    """Natural logits of the dequantized inputs, fp64."""
    q, keys = p["q"].double() * spread(p["q_scale"]), p["k"].double() * spread(p["k_scale"])
    logits = q @ keys.mT * p["softmax_scale"]
    if p["key_mask"] is not None:
        logits = logits.masked_fill(~p["key_mask"][:, None, None], -math.inf)
    return logits


def dequantized_values(p):
    zero_point = 0 if p["v_zero_point"] is None else spread(p["v_zero_point"])
    return (p["v"].double() - zero_point) * spread(p["v_scale"])


@pytest.mark.parity("P3")
def test_by_hand():
    """One query, three keys: 255 * exp2(0, -1, -3) = 255, 127.5 -> 128 (even), 31.875 -> 32."""
    q = torch.zeros(1, 1, 1, 32, dtype=torch.int8)
    keys = torch.zeros(1, 1, 3, 32, dtype=torch.int8)
    q[..., 0], keys[..., 0] = 1, torch.tensor([0, -1, -3], dtype=torch.int8)
    v = torch.zeros(1, 1, 3, 32, dtype=torch.int8)
    v[0, 0, :, 5] = torch.tensor([10, -20, 127], dtype=torch.int8)
    one, half, ln2 = torch.ones(1), torch.tensor([0.5]), math.log(2)
    o = k.attention_qk_int8_pv_int8(q, keys, v, one, one, half, softmax_scale=ln2)
    expected = (255 * 10 + 128 * -20 + 32 * 127) * (0.5 / (255 + 128 + 32))
    torch.testing.assert_close(o[0, 0, 0, 5].item(), expected, rtol=2.0**-22, atol=0)
    assert o.count_nonzero() == 1
    zero = torch.tensor([7], dtype=torch.int32)
    o = k.attention_qk_int8_pv_int8(
        q, keys, v, one, one, half, softmax_scale=ln2, v_zero_point=zero
    )
    torch.testing.assert_close(o[0, 0, 0, 5].item(), expected - 3.5, rtol=2.0**-21, atol=0)
    torch.testing.assert_close(o[0, 0, 0, 0].item(), -3.5, rtol=2.0**-22, atol=0)


@pytest.mark.parity("P3")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("keys", [256, 1024])
def test_error_against_fp64_of_the_dequantized_inputs(head_dim, keys, attention_problem, generator):
    """The bars of the ops: 1 % with int8 probabilities, 0.3 % with bf16, on logits of deviation 1."""
    p = attention_problem(64, keys, head_dim, generator, mask=False)
    exact = torch.softmax(logits_of(p), 3)
    expected = exact @ dequantized_values(p)
    *positional, v_zero_point, softmax_scale, key_mask = int8_arguments(p)
    o = k.attention_qk_int8_pv_int8(
        *positional, v_zero_point=v_zero_point, softmax_scale=softmax_scale, key_mask=key_mask
    )
    assert (o - expected).norm() / expected.norm() < 0.01
    expected = exact @ p["values"].double()
    *positional, softmax_scale, key_mask = bf16_arguments(p)
    o = k.attention_qk_int8_pv_bf16(*positional, softmax_scale=softmax_scale, key_mask=key_mask)
    assert (o - expected).norm() / expected.norm() < 0.003


def test_the_quantizers_feed_it(attention_problem, generator):
    """Float attention, through our quantizers with one scale a token or one for all."""
    q, keys, v = (torch.randn(2, 3, 50, 72, generator=generator) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, v)
    v_scale = k.symmetric_scale(v.abs().amax((0, 2, 3)))  # one a head
    v_codes = k.quantize_symmetric(v, v_scale[:, None, None])
    (q8, q_scale), (k8, k_scale) = (k.quantize_per_token(x.reshape(-1, 72)) for x in (q, keys))
    per_token = [q8.view(q.shape), k8.view(q.shape), v_codes]
    per_token += [q_scale.view(2, 3, 50), k_scale.view(2, 3, 50)]
    zero = torch.zeros(1, dtype=torch.int32)
    q_scale, k_scale = (k.symmetric_scale(x.abs().max().reshape(1)) for x in (q, keys))
    static = [
        k.quantize_static(q.reshape(-1, 72), q_scale, zero).view(q.shape),
        k.quantize_static(keys.reshape(-1, 72), k_scale, zero).view(q.shape),
    ]
    for arguments in (per_token, [*static, v_codes, q_scale, k_scale]):
        o = k.attention_qk_int8_pv_int8(*arguments, v_scale, softmax_scale=72**-0.5)
        # half a step uniform error: absmax 4 / 127 / sqrt(12) = 0.9 % of q, k and v each
        assert (o - expected).norm() / expected.norm() < 0.03


def test_static_equals_per_head_equals_per_token_bitwise(attention_problem, generator):
    p = attention_problem(9, 20, 64, generator, scales="static")
    expected = [
        reference.attention_qk_int8_pv_int8(*int8_arguments(p), torch.float32),
        reference.attention_qk_int8_pv_bf16(*bf16_arguments(p), torch.float32),
    ]
    per_head = {n: p[n].expand(2).contiguous() for n in ("v_scale", "v_zero_point")}
    tokens = {"q_scale": 9, "k_scale": 20}
    per_token = {n: p[n].expand(2, 2, t).contiguous() for n, t in tokens.items()}
    for other in (p | per_head, p | per_token):
        o = reference.attention_qk_int8_pv_int8(*int8_arguments(other), torch.float32)
        assert torch.equal(o, expected[0])
        o = reference.attention_qk_int8_pv_bf16(*bf16_arguments(other), torch.float32)
        assert torch.equal(o, expected[1])


def test_masked_keys_do_not_count(attention_problem, generator):
    p = attention_problem(5, 12, 32, generator)
    p["key_mask"] = torch.arange(12).expand(2, 12).contiguous() < 7
    short = p | {n: p[n][:, :, :7].contiguous() for n in ("k", "v", "values", "k_scale")}
    short["key_mask"] = None
    for op, of in (("int8", int8_arguments), ("bf16", bf16_arguments)):
        run = getattr(reference, f"attention_qk_int8_pv_{op}")
        torch.testing.assert_close(
            run(*of(p), torch.float32), run(*of(short), torch.float32), rtol=1e-7, atol=0
        )


@pytest.mark.parametrize("op", ["int8", "bf16"])
def test_codes_are_what_the_quantizer_makes_of_the_outputs(op, attention_problem, generator):
    p = attention_problem(5, 12, 32, generator)
    names = ("q", "k", "v" if op == "int8" else "values", "q_scale", "k_scale")
    run = getattr(k, f"attention_qk_int8_pv_{op}")
    positional = [p[n] for n in names] + ([p["v_scale"]] if op == "int8" else [])
    keywords = {"softmax_scale": p["softmax_scale"], "key_mask": p["key_mask"]}
    y = run(*positional, **keywords)
    scale, zero_point = torch.tensor([0.02]), torch.tensor([-9], dtype=torch.int32)
    smooth_inv = torch.rand(64, generator=generator)
    codes = run(
        *positional,
        **keywords,
        out_scale=scale,
        out_zero_point=zero_point,
        out_smooth_inv=smooth_inv,
    )
    rows = y.transpose(1, 2).reshape(10, 64)
    expected = k.quantize_static(rows, scale, zero_point, smooth_inv=smooth_inv)
    assert torch.equal(codes.transpose(1, 2).reshape(10, 64), expected)
    assert codes.stride() == y.stride()


@pytest.mark.parametrize("at_once", [1, 30, 1000])
@pytest.mark.parametrize("scales", ["static", "per_head", "per_token"])
def test_the_reference_takes_any_number_of_heads_at_a_time(
    at_once, scales, attention_problem, generator, monkeypatch
):
    p = attention_problem(5, 6, 32, generator, scales=scales, heads=3)
    expected = [reference.attention_qk_int8_pv_int8(*int8_arguments(p), torch.float32)]
    expected += [reference.attention_qk_int8_pv_bf16(*bf16_arguments(p), torch.float32)]
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", at_once)
    assert torch.equal(
        reference.attention_qk_int8_pv_int8(*int8_arguments(p), torch.float32), expected[0]
    )
    assert torch.equal(
        reference.attention_qk_int8_pv_bf16(*bf16_arguments(p), torch.float32), expected[1]
    )


@pytest.mark.parametrize("keys", [258, 259])
def test_sums_of_values_are_exact_where_fp32_ends(keys):
    """All keys alike: 255 times (127 - -128) from each; 258 of them are the most that fp32 holds."""
    ones = torch.ones(1, 1, keys, 32, dtype=torch.int8)
    v = torch.full_like(ones, 127)
    v[0, 0, 0] = 126  # an odd sum, which fp32 could not hold above 2**24
    one = torch.ones(1)
    y = reference.attention_qk_int8_pv_int8(
        ones[:, :, :1], ones, v, one, one, one, torch.tensor([-128], dtype=torch.int32), 1.0, None,
        torch.float32,
    )  # fmt: skip
    total = 255 * (255 * keys - 1)
    expected = torch.tensor(total).float() * (one / torch.tensor(255.0 * keys))
    assert torch.equal(y.flatten(), expected.expand(32))
