"""Attention with bf16 probabilities: the kernel against the definition, within a derived bound."""

import functools

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import attention_qk_int8_pv_bf16 as kernel
from ditq_kernels.launch.tuning import AttentionConfig
from ditq_kernels.reference import attention as reference

strict = functools.partial(kernel.launch, strict=True)  # one look: test_attention_one_look.py
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# PTX: ex2.approx is within 2**-22; the reference rounds once
EXP2_ERROR = 2.0**-22 + 2.0**-24
NAMES = ("q", "k", "values", "q_scale", "k_scale", "softmax_scale", "key_mask")


def arguments(p, device="cpu"):
    values = [p[name] for name in NAMES]
    return [v.to(device) if isinstance(v, torch.Tensor) else v for v in values]


def bound_of(p, out_dtype=torch.float32):
    """Largest difference of each output from the reference, fp64.

    Both sides exponentiate the same fp32 logits, so bf16 probabilities are equal except, by at most
    2**-7 of them, where p lies within the error of exp2 of a tie. Tk products are summed in another
    order, by tensor cores that truncate (2**-23 a step); so is the divisor, which also carries the
    error of exp2. All in units of sum(p * |v|) / sum(p), then both results are rounded.
    """
    names = ("q", "k", "q_scale", "k_scale", "softmax_scale", "key_mask")
    probabilities = reference._unnormalized_probabilities(*(p[n] for n in names)).double()
    exponent = torch.floor(torch.log2(probabilities.clamp_min(2.0**-126)))
    steps = probabilities * torch.exp2(7 - exponent)  # in units of the last place of bf16
    near = ((steps - steps.floor() - 0.5).abs() <= steps * EXP2_ERROR).double()
    size = p["values"].double().abs()
    relative = 2 * (size.shape[2] + 2) * 2.0**-23 + EXP2_ERROR + torch.finfo(out_dtype).eps
    moved = 2.0**-7 * (near * probabilities) @ size + relative * (probabilities @ size)
    return moved / probabilities.sum(3, keepdim=True).clamp_min(1)


def assert_within(got, expected, bound):
    excess = (got.cpu().double() - expected.double()).abs() - bound
    assert not got.isnan().any()
    assert (excess <= 0).all(), f"{int((excess > 0).sum())} outputs exceed by {excess.max():.2e}"


# one, odd, off-tile in queries and keys; the interpreter's tiles are 16 queries by 32 keys
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"),
    [(1, 1, 32), (17, 40, 64), (18, 65, 72), (5, 64, 88), (3, 33, 96), (2, 31, 128)],
)
@pytest.mark.parametrize("scales", ["static", "per_token"])
@pytest.mark.usefixtures("poisoned")
def test_kernel_equals_reference(
    queries, keys, head_dim, scales, device, attention_problem, generator
):
    p = attention_problem(queries, keys, head_dim, generator, scales=scales)
    got = strict(*arguments(p, device), torch.float32)
    expected = reference.attention_qk_int8_pv_bf16(*arguments(p), torch.float32)
    assert got.stride() == expected.stride()
    assert_within(got, expected, bound_of(p))


@pytest.mark.parametrize("config", [(16, 64, 4, 2), (32, 128, 4, 2)])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_kernel_of_every_tile(config, mask, device, attention_problem, generator):
    p = attention_problem(20, 100, 72, generator, mask=mask, batch=1)
    config = AttentionConfig(*config)
    got = strict(*arguments(p, device), torch.float32, config=config)
    expected = reference.attention_qk_int8_pv_bf16(*arguments(p), torch.float32)
    assert_within(got, expected, bound_of(p))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_output_types(out_dtype, device, attention_problem, generator):
    p = attention_problem(3, 40, 64, generator)
    got = strict(*arguments(p, device), out_dtype)
    assert got.dtype == out_dtype
    expected = reference.attention_qk_int8_pv_bf16(*arguments(p), out_dtype)
    assert_within(got, expected, bound_of(p, out_dtype))


@pytest.mark.usefixtures("poisoned")
def test_codes_of_the_outputs(device, attention_problem, generator):
    """Exactly the quantizer of the fp32 outputs."""
    p = attention_problem(5, 33, 72, generator, batch=1)
    y = strict(*arguments(p, device), torch.float32)
    codes = (torch.tensor([0.004]), torch.tensor([100], dtype=torch.int32), torch.rand(144) + 0.5)
    got = strict(*arguments(p, device), torch.float32, *(x.to(device) for x in codes))
    expected = k.quantize_static(y.cpu().transpose(1, 2).reshape(5, 144), *codes)
    assert torch.equal(got.cpu().transpose(1, 2).reshape(5, 144), expected)


@pytest.mark.parametrize("keys", [20, 70])  # one pass, two passes
@pytest.mark.usefixtures("poisoned")
def test_an_image_without_keys_gives_zeros(keys, device, attention_problem, generator):
    p = attention_problem(3, keys, 32, generator)
    p["key_mask"][1] = False
    got = strict(*arguments(p, device), torch.float32).cpu()
    for o in (got, reference.attention_qk_int8_pv_bf16(*arguments(p), torch.float32)):
        assert o[1].count_nonzero() == 0
        assert o[0].isfinite().all()


@pytest.mark.usefixtures("poisoned")
def test_views_of_a_projection(device, attention_problem, generator):
    p = attention_problem(9, 21, 72, generator, scales="static")
    expected = strict(*arguments(p, device), torch.float32)
    for name in ("q", "k", "values"):  # [B, T, H, D] memory
        p[name] = p[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(strict(*arguments(p, device), torch.float32), expected)


def test_no_queries(device, attention_problem, generator):
    p = attention_problem(0, 8, 64, generator)
    assert strict(*arguments(p, device), torch.float32).shape == (2, 2, 0, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"), [(256, 256, 72), (1024, 1024, 72), (256, 300, 64)]
)
@pytest.mark.parametrize("scales", ["static", "per_token"])
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_op_on_gpu_equals_reference(
    queries, keys, head_dim, scales, out_dtype, attention_problem, generator
):
    """DiT-XL at 256 and 512 pixels, a cross-attention."""
    p = attention_problem(queries, keys, head_dim, generator, scales=scales, heads=16)
    *positional, softmax_scale, key_mask = arguments(p, "cuda")
    got = k.attention_qk_int8_pv_bf16(
        *positional, softmax_scale=softmax_scale, key_mask=key_mask, out_dtype=out_dtype
    )
    expected = reference.attention_qk_int8_pv_bf16(*arguments(p), out_dtype)
    assert_within(got, expected, bound_of(p, out_dtype))
