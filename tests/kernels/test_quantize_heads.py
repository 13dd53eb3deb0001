"""Norm, rotation, shift and quantizer of heads: against diffusers and torch in fp64, and the kernel against both."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

import ditq_kernels as k
from ditq_kernels._triton import quantize_heads as kernel
from ditq_kernels.reference import heads as reference

EPS = 1e-6
UNIT = 2.0**-24


def problem(generator, tokens=7, heads=3, head_dim=64, wide=False, dtype=torch.float32):
    """x inside a fused projection, a norm weight, tables of angles for each pair."""
    fused = torch.randn(2, tokens, 3, heads, head_dim, generator=generator) * 2 + 0.3
    weight = torch.rand(heads * head_dim if wide else head_dim, generator=generator) + 0.5
    angle = torch.rand(tokens, head_dim // 2, generator=generator) * 6
    return fused[:, :, 1].to(dtype), weight, angle.cos(), angle.sin()


def exact(x, weight=None, cos=None, sin=None, interleaved=True, shift=None, eps=EPS):
    """y [B, H, T, D] in fp64, by torch's norm and a rotation matrix for each pair."""
    y = x.double()
    if weight is not None:
        rows = y.flatten(2) if weight.numel() != x.shape[3] else y
        rows = torch.nn.functional.rms_norm(rows, (weight.numel(),), weight.double(), eps)
        y = rows.reshape(y.shape)
    if cos is not None:
        half = x.shape[3] // 2
        i = torch.arange(half)
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = torch.empty_like(y)
        c, s = cos.double()[:, None], sin.double()[:, None]
        turned[..., a] = y[..., a] * c - y[..., b] * s
        turned[..., b] = y[..., b] * c + y[..., a] * s
        y = turned
    y = y.transpose(1, 2)
    return y if shift is None else y - shift.double()[:, :, None]


def assert_codes(codes, scales, y, size, scale=None):
    """Codes of values that err by at most 16 roundings of `size`, the largest term of any sum inside.

    A norm sums D or H * D squares, all positive, so that its error is small against its own roundings' bound.
    """
    error = 40 * UNIT * size
    if scale is None:
        expected = y.abs().amax(3) / 127
        assert (
            (scales.double() - expected).abs() <= error.amax(3) / 127 + 2 * UNIT * expected
        ).all()
        step, largest = scales.double()[..., None], 127
    else:
        assert scales.numel() == 0
        step, largest = scale.double()[:, None, None], 128
    steps = (y / step).clamp(-largest, 127)
    slack = error / step + 4 * UNIT * steps.abs()
    assert ((codes.double() - steps).abs() <= 0.5 + slack).all()


def size_of(y, x):
    """What roundings of a value are relative to: both channels of a pair, and the shift."""
    return y.abs().amax(3, keepdim=True) + x.double().abs().amax((1, 3))[:, :, None, None]


STAGES = ["none", "norm", "wide norm", "interleaved", "halves", "all"]


def arguments_of(stage, generator, dtype=torch.float32, **sizes):
    wide = stage == "wide norm"
    x, weight, cos, sin = problem(generator, wide=wide, dtype=dtype, **sizes)
    named = {}
    if "norm" in stage or stage == "all":
        named["norm_weight"] = weight
    if stage in ("interleaved", "halves", "all"):
        named |= {"cos": cos, "sin": sin, "interleaved": stage != "halves"}
    if stage == "all":
        named["shift"] = torch.randn(x.shape[0], *x.shape[2:], generator=generator)
    return x, named


def expected_of(x, named):
    given = dict(named)
    weight = given.pop("norm_weight", None)
    return exact(x, weight, **given)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("static", [False, True])
def test_reference_against_fp64(stage, static, generator):
    x, named = arguments_of(stage, generator)
    scale = torch.tensor([0.02, 0.031, 0.017]) if static else None
    codes, scales = k.quantize_heads(x, **named, eps=EPS, scale=scale)
    assert codes.shape == (2, 3, 7, 64)
    assert codes.is_contiguous()
    y = expected_of(x, named)
    assert_codes(codes, scales, y, size_of(y, x), scale)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 32), (5, 3, 72), (3, 20, 128)])
@pytest.mark.usefixtures("poisoned")
def test_kernel_against_fp64(stage, static, tokens, heads, head_dim, device, generator):
    sizes = {"tokens": tokens, "heads": heads, "head_dim": head_dim}
    dtype = torch.bfloat16 if heads == 20 else torch.float32
    x, named = arguments_of(stage, generator, dtype, **sizes)
    scale = torch.rand(heads, generator=generator) * 0.02 + 0.01 if static else None
    codes, scales = launch(device, x, named, scale)
    y = expected_of(x, named)
    assert_codes(codes, scales, y, size_of(y, x), scale)
    if stage == "none":  # every step is rounded alike: bit for bit
        for got, expected in zip((codes, scales), k.quantize_heads(x, scale=scale), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("run", [k.quantize_heads, None])
@pytest.mark.usefixtures("poisoned")
def test_a_scale_for_each_head_of_each_image(run, device, generator):
    x, *_ = problem(generator)
    scale = torch.rand(2, 3, generator=generator) * 0.02 + 0.01
    whole = launch(device, x, {}, scale) if run is None else run(x, scale=scale)
    for image in range(2):
        alone = k.quantize_heads(x[image : image + 1], scale=scale[image])
        assert torch.equal(whole[0][image], alone[0][0])


def launch(device, x, named, scale=None):
    order = ("norm_weight", "cos", "sin", "shift")
    weight, cos, sin, shift = (None if named.get(n) is None else named[n].to(device) for n in order)
    scale = None if scale is None else scale.to(device)
    interleaved = named.get("interleaved", True)
    made = kernel.launch(x.to(device), weight, EPS, cos, sin, interleaved, shift, scale)
    return [part.cpu() for part in made]


def test_codes_are_those_of_the_row_quantizers(generator):
    x, *_ = problem(generator)
    codes, scales = k.quantize_heads(x)
    rows, row_scales = k.quantize_per_token(x.reshape(-1, 64))
    assert torch.equal(codes, rows.view(x.shape).transpose(1, 2))
    assert torch.equal(scales, row_scales.view(x.shape[:3]).transpose(1, 2))
    steps = torch.tensor([0.02, 0.031, 0.017])
    codes, _ = k.quantize_heads(x, scale=steps)
    rows = k.quantize_static(x.reshape(-1, 192), steps)
    assert torch.equal(codes, rows.view(x.shape).transpose(1, 2))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_that_of_diffusers(interleaved, generator):
    """In fp32, bit for bit: tables for each channel, for each pair, and complex ones."""
    x, weight, cos, sin = problem(generator)
    normed = torch.nn.functional.rms_norm(x, (64,), weight, EPS)
    repeated = [t.repeat_interleave(2, 1) if interleaved else t.repeat(1, 2) for t in (cos, sin)]
    y = apply_rotary_emb(
        normed, tuple(repeated), use_real_unbind_dim=-1 if interleaved else -2, sequence_dim=1
    )
    expected = k.quantize_heads(y)
    for tables in ((cos, sin), repeated, [t.expand(2, -1, -1) for t in repeated]):
        got = k.quantize_heads(x, weight, *tables, eps=EPS, interleaved=interleaved)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    if interleaved:
        turns = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))
        lumina = apply_rotary_emb(x, turns[None], use_real=False)
        codes, scales = k.quantize_heads(x, cos=turns.real, sin=turns.imag)
        torch.testing.assert_close(scales, k.quantize_heads(lumina)[1], rtol=4 * UNIT, atol=0)
        assert (codes.int() - k.quantize_heads(lumina)[0].int()).abs().max() <= 1


@pytest.mark.usefixtures("poisoned")
def test_strided_tables_of_each_image(device, generator):
    """Complex tables [B, T, D / 2] as real and imaginary views."""
    x, weight, *_ = problem(generator)
    angle = torch.rand(2, 7, 32, generator=generator) * 6
    table = torch.polar(torch.ones_like(angle), angle)
    named = {"norm_weight": weight, "cos": table.real, "sin": table.imag}
    for image in range(2):
        alone = {"norm_weight": weight, "cos": table[image].real, "sin": table[image].imag}
        got = launch(device, x[image : image + 1], alone)
        together = launch(device, x, named)
        assert torch.equal(got[0][0], together[0][image])
        assert torch.equal(got[1][0], together[1][image])


def test_a_shift_of_keys_leaves_the_attention(generator):
    """Softmax ignores what all keys share; with their mean away the scales are smaller and the error, too."""
    q, keys, v = (torch.randn(1, 40, 2, 64, generator=generator) for _ in range(3))
    keys = keys + 8 * torch.randn(1, 1, 2, 64, generator=generator)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (q, keys, v))
    )
    errors = []
    for shift in (None, keys.mean(1)):
        codes = (k.quantize_heads(q), k.quantize_heads(keys, shift=shift))
        values = v.bfloat16().transpose(1, 2)
        (q8, q_scale), (k8, k_scale) = codes
        y = k.attention_qk_int8_pv_bf16(q8, k8, values, q_scale, k_scale, softmax_scale=0.125)
        errors.append(((y - expected).norm() / expected.norm()).item())
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 0.02


def test_no_tokens(device, generator):
    x = torch.zeros(2, 0, 3, 64)
    for made in (
        kernel.launch(x.to(device), None, EPS, None, None, True, None, None),
        k.quantize_heads(x),
    ):
        assert made[0].shape == (2, 3, 0, 64)
        assert made[1].shape == (2, 3, 0)


def test_programs_hold_what_they_norm():
    assert kernel.shape_of_program(24, 128, wide=False) == (16, 128, 2)
    assert kernel.shape_of_program(40, 128, wide=True) == (64, 128, 8)
    assert kernel.shape_of_program(16, 72, wide=False) == (16, 128, 2)


def refusals(generator):
    x, weight, cos, sin = problem(generator)
    yield {"x": x[0]}, r"x must be \[B, T, H, D\]"
    yield {"x": x.transpose(2, 3)}, "heads of x must be contiguous"
    yield {"norm_weight": weight[:5]}, r"norm_weight must be \[64\] .* or \[192\]"
    yield {"norm_weight": weight.double()}, "norm_weight must be contiguous"
    yield {"norm_weight": weight, "eps": -1.0}, "eps must be at least 0"
    yield {"cos": cos}, "sin is missing"
    yield {"cos": cos[:3], "sin": sin[:3]}, r"cos must be \[7, D\]"
    yield {"cos": cos.double(), "sin": sin.double()}, "cos must be float32"
    yield {"cos": cos, "sin": sin.T.contiguous().T}, "one shape and layout"
    yield {"shift": cos}, r"shift must be \[B, H, D\] = \[2, 3, 64\]"
    yield {"scale": torch.ones(2)}, r"scale must be float32 \[3\] or \[2, 3\]"


@pytest.mark.parametrize("case", range(11))
def test_refusals(case, generator):
    change, sentence = list(refusals(generator))[case]
    with pytest.raises(ValueError, match=sentence):
        k.quantize_heads(**({"x": problem(generator)[0]} | change))


def test_definition_norms_in_the_order_of_torch(generator):
    x, weight, *_ = problem(generator)
    expected = torch.nn.functional.rms_norm(x, (64,), weight, EPS)
    assert torch.equal(reference._normed(x, weight, EPS), expected)
