"""Layer norm, modulation and quantizer: values against fp64, codes against the quantizers bit for bit."""

import re

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import adaln_quantize as kernel
from ditq_kernels.launch.tuning import RowConfig
from ditq_kernels.ops import dispatch
from ditq_kernels.reference import fused as reference_fused

EPS = 1e-6


def problem(num_tokens, in_features, samples, generator, dtype=torch.float32):
    """x in a wider matrix, multiplier and shift inside modulation of six parts, smooth_inv."""
    x = torch.randn(num_tokens, in_features + 6, generator=generator) * 3 + 1
    x[:, 4] *= 40  # an outlier channel, as DiT has
    modulation = torch.randn(samples, 6 * in_features, generator=generator).chunk(6, dim=1)
    smooth_inv = torch.rand(in_features, generator=generator) + 0.5
    return x.to(dtype)[:, 3 : 3 + in_features], modulation[1], modulation[0], smooth_inv


def groups(in_features, samples, generator):
    table = torch.randn(3, in_features, generator=generator)
    return {"group_shift": table, "group_index": torch.randint(3, (samples,), generator=generator)}


STATIC = {"scale": torch.tensor([0.031]), "zero_point": torch.tensor([-21], dtype=torch.int32)}


def launch(
    device,
    x,
    multiplier,
    shift,
    smooth_inv,
    values_dtype=None,
    config=None,
    asymmetric=False,
    **named,
):
    order = ("group_shift", "group_index", "scale", "zero_point")
    tensors = [x, multiplier, shift, smooth_inv, *(named.get(name) for name in order)]
    moved = [None if value is None else value.to(device) for value in tensors]
    codes, scale, zero_point, values = kernel.launch(
        *moved[:3], EPS, *moved[3:6], *moved[6:], values_dtype, asymmetric, config=config
    )
    made = (codes, scale, zero_point, values) if asymmetric else (codes, scale, values)
    return [part.cpu() for part in made]


def assert_values(y, x, multiplier, shift, group_shift=None, group_index=None):
    """Within the roundings of any order of summation of the exact values."""
    x64 = x.double()
    width = x.shape[1]
    mean, spread = x64.mean(1, keepdim=True), x64.var(1, unbiased=False, keepdim=True)
    normed = (x64 - mean) / (spread + EPS).sqrt()
    rows = len(x) // len(multiplier)
    if group_shift is not None:
        shift = shift.double() - group_shift.double()[group_index]
    a, b = (part.double().repeat_interleave(rows, 0) for part in (multiplier, shift))
    exact = normed * a + b
    # the mean errs by at most width roundings of mean |x|, the variance by width + 2 roundings of itself (and so the
    # deviation by half), then about eight more roundings of the parts
    unit = 2.0**-24
    mean_error = width * unit * x64.abs().mean(1, keepdim=True) / (spread + EPS).sqrt()
    error = (2 * mean_error + (width + 8) * unit * normed.abs()) * a.abs() + 4 * unit * b.abs()
    assert ((y.double() - exact).abs() <= error).all()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_the_reference(grouped, dtype, generator):
    x, multiplier, shift, _ = problem(6, 96, 3, generator, dtype)
    named = groups(96, 3, generator) if grouped else {}
    *_, y = k.adaln_quantize(x, multiplier, shift, eps=EPS, values_dtype=torch.float32, **named)
    assert_values(y, x, multiplier, shift, **named)


# one, odd, off-tile rows; widths of one part, two parts, padded; samples in and across programs
@pytest.mark.parametrize(
    ("num_tokens", "in_features", "samples"),
    [(1, 64, 1), (16, 72, 2), (33, 100, 3), (5, 33, 5), (6, 1152, 2)],
)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_kernel_values_are_right_and_its_codes_are_those_of_its_values(
    num_tokens, in_features, samples, static, device, generator
):
    x, multiplier, shift, smooth_inv = problem(num_tokens, in_features, samples, generator)
    named = groups(in_features, samples, generator)
    given = STATIC if static else {}
    for smooth, table in ((None, {}), (smooth_inv, named)):
        q, scale, y = launch(device, x, multiplier, shift, smooth, torch.float32, **table, **given)
        assert_values(y, x, multiplier, shift, **table)
        if static:
            assert torch.equal(q, k.quantize_static(y, *given.values(), smooth))
        else:
            expected_q, expected_scale = k.quantize_per_token(y, smooth)
            assert torch.equal(scale, expected_scale)
            assert torch.equal(q, expected_q)
            *codes, y = launch(
                device, x, multiplier, shift, smooth, torch.float32, asymmetric=True, **table
            )
            assert all(map(torch.equal, codes, k.quantize_per_token(y, smooth, asymmetric=True)))


@pytest.mark.usefixtures("poisoned")
def test_values_change_nothing_and_are_rounded_last(device, generator):
    x, multiplier, shift, smooth_inv = problem(9, 40, 3, generator, torch.bfloat16)
    q, scale, none = launch(device, x, multiplier, shift, smooth_inv)
    assert none.shape == (0, 40)
    with_fp32 = launch(device, x, multiplier, shift, smooth_inv, torch.float32)
    with_bf16 = launch(device, x, multiplier, shift, smooth_inv, torch.bfloat16)
    for other in (with_fp32, with_bf16):
        assert torch.equal(other[0], q)
        assert torch.equal(other[1], scale)
    assert torch.equal(with_fp32[2].bfloat16(), with_bf16[2])


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_height(rows, device, generator):
    x, multiplier, shift, smooth_inv = problem(12, 40, 3, generator)
    q, _, y = launch(device, x, multiplier, shift, smooth_inv, torch.float32, RowConfig(rows, 4))
    assert_values(y, x, multiplier, shift)
    assert torch.equal(q, k.quantize_per_token(y, smooth_inv)[0])


def test_public_op_gives_the_scale_it_was_given(generator):
    x, multiplier, shift, smooth_inv = problem(6, 40, 3, generator)
    q, scale, y = k.adaln_quantize(x, multiplier, shift, smooth_inv, **STATIC)
    assert scale is STATIC["scale"]
    assert y is None
    *_, y = k.adaln_quantize(x, multiplier, shift, values_dtype=torch.float32)
    assert torch.equal(q, k.quantize_static(y, *STATIC.values(), smooth_inv))
    *codes, none = k.adaln_quantize(x, multiplier, shift, smooth_inv, asymmetric=True)
    assert none is None
    assert all(map(torch.equal, codes, k.quantize_per_token(y, smooth_inv, asymmetric=True)))


def test_a_constant_row_is_the_shift(device):
    x = torch.full((2, 8), 3.0)
    multiplier, shift = torch.ones(1, 8), torch.arange(8.0)[None] - 3
    *_, y = launch(device, x, multiplier, shift, None, torch.float32)
    assert torch.equal(y, shift.expand(2, 8))


def test_no_tokens(device):
    q, scale, _ = launch(device, torch.zeros(0, 8), torch.zeros(1, 8), torch.zeros(1, 8), None)
    assert (q.shape, scale.shape) == ((0, 8), (0,))


@pytest.mark.parametrize("static", [False, True])
def test_opcheck(static, generator):
    x, multiplier, shift, smooth_inv = problem(6, 40, 3, generator, torch.bfloat16)
    table = tuple(groups(40, 3, generator).values())
    given = tuple(STATIC.values()) if static else (None, None)
    for values_dtype in (None, torch.bfloat16):
        arguments = (x, multiplier, shift, EPS, smooth_inv, *table, *given, values_dtype)
        torch.library.opcheck(dispatch.adaln_quantize.overload, (*arguments, not static))
    torch.library.opcheck(
        dispatch.gelu_quantize.overload, (x, smooth_inv, *given, *table, not static)
    )


REFUSALS = [
    ({"x": torch.zeros(6, 40).double()}, "x must be [T, K] float32"),
    (
        {"multiplier": torch.zeros(3, 41)},
        "multiplier must be [3, 40] with one row a sample, got [3",
    ),
    ({"multiplier": torch.zeros(3, 40).half()}, "multiplier must be [B, K] float32, got [3, 40]"),
    ({"shift": torch.zeros(2, 40)}, "shift must be [3, 40] with one row a sample, got [2, 40]"),
    (
        {"multiplier": torch.zeros(4, 40), "shift": torch.zeros(4, 40)},
        "multiplier must have one entry for each sample, and samples equally many of the T=6 rows",
    ),
    ({"smooth_inv": torch.zeros(39)}, "smooth_inv must be [40] float32, got [39] float32"),
    ({"scale": torch.ones(1)}, "scale and zero_point go together, zero_point is missing"),
    ({**STATIC, "asymmetric": True}, "asymmetric asks for a zero point per token"),
    ({"group_index": torch.zeros(3).long()}, "go together, group_shift is missing"),
    (
        {"group_shift": torch.zeros(2, 40), "group_index": torch.zeros(2).long()},
        "group_index must be [3] int64, got [2] int64",
    ),
    ({"values_dtype": torch.int8}, "out_dtype must be float32 | float16 | bfloat16"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSALS)
def test_what_does_not_fit_is_refused(change, sentence, generator):
    x, multiplier, shift, _ = problem(6, 40, 3, generator)
    arguments = {"x": x, "multiplier": multiplier, "shift": shift} | change
    with pytest.raises(ValueError, match=f"^adaln_quantize: .*{re.escape(sentence)}"):
        k.adaln_quantize(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "in_features"), [(512, 1152), (8192, 1152), (99, 3072)])
def test_op_on_gpu(num_tokens, in_features, generator):
    x, multiplier, shift, smooth_inv = problem(
        num_tokens, in_features, 1, generator, torch.bfloat16
    )
    q, _, y = launch(torch.device("cuda"), x, multiplier, shift, smooth_inv, torch.float32)
    assert_values(y, x, multiplier, shift)
    assert torch.equal(q, k.quantize_per_token(y, smooth_inv)[0])


def test_the_reference_is_layer_norm_then_the_quantizer(generator):
    """As a block runs it without fusion, bit for bit."""
    x, multiplier, shift, smooth_inv = problem(6, 40, 3, generator)
    normed = torch.nn.functional.layer_norm(x.view(3, 2, 40), (40,), eps=EPS)
    y = (normed * multiplier[:, None] + shift[:, None]).view(6, 40)
    q, scale, *_ = reference_fused.adaln_quantize(
        x, multiplier, shift, EPS, smooth_inv, None, None, None, None, None
    )
    expected_q, expected_scale = k.quantize_per_token(y, smooth_inv)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)
