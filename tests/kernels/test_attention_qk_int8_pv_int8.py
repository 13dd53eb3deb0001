"""Attention with int8 probabilities: the kernel against the definition, nearly everywhere bit for bit."""

import functools

import pytest
import torch

import ditq_kernels as k
from ditq_kernels._triton import attention_qk_int8_pv_int8 as kernel
from ditq_kernels.launch.tuning import AttentionConfig
from ditq_kernels.reference import attention as reference

strict = functools.partial(kernel.launch, strict=True)  # one look: test_attention_one_look.py
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# PTX: ex2.approx is within 2**-22; the reference rounds once
EXP2_ERROR = 2.0**-22 + 2.0**-24
NAMES = (
    "q",
    "k",
    "v",
    "q_scale",
    "k_scale",
    "v_scale",
    "v_zero_point",
    "softmax_scale",
    "key_mask",
)


def arguments(p, device="cpu"):
    values = [p[name] for name in NAMES]
    return [v.to(device) if isinstance(v, torch.Tensor) else v for v in values]


def bound_of(p):
    """Largest difference of each output from the reference, fp64.

    Both sides exponentiate the same fp32 logits, so codes are equal except, by 1, where 255 * p lies
    within the error of exp2 of a half-integer. With d_j in {-1, 0, 1} there:
    o' - o = v_scale * sum_j d_j * (v_j - o) / sum(code'). Rows without such an entry get 0.
    """
    names = ("q", "k", "q_scale", "k_scale", "softmax_scale", "key_mask")
    steps = 255 * reference._unnormalized_probabilities(*(p[n] for n in names)).double()
    near = ((steps - steps.floor() - 0.5).abs() <= steps * EXP2_ERROR).double()
    rounded, num_near = steps.round(), near.sum(3, keepdim=True)
    v = p["v"].double() - p["v_zero_point"][:, None, None]
    o = rounded @ v / rounded.sum(3, keepdim=True).clamp_min(1)
    moved = near @ v.abs() + num_near * o.abs()
    moved *= p["v_scale"][:, None, None]
    return moved / (rounded.sum(3, keepdim=True) - num_near).clamp_min(1)


def assert_within(got, expected, bound, out_dtype=torch.float32):
    """Bit for bit where the bound is 0; elsewhere three fp32 roundings and the last one come on top."""
    got, expected = got.cpu().double(), expected.double()
    relative = 3 * 2.0**-23 + torch.finfo(out_dtype).eps
    rounding = relative * torch.maximum(got.abs(), expected.abs())
    excess = (got - expected).abs() - torch.where(bound > 0, bound + rounding, 0)
    assert not got.isnan().any()
    assert (excess <= 0).all(), f"{int((excess > 0).sum())} outputs exceed by {excess.max():.2e}"


# one, odd, off-tile in queries and keys; the interpreter's tiles are 16 queries by 32 keys
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"),
    [(1, 1, 32), (17, 40, 64), (18, 65, 72), (16, 32, 72), (5, 64, 88), (3, 33, 96), (2, 31, 128)],
)
@pytest.mark.parametrize("scales", ["static", "per_head", "per_token"])
@pytest.mark.usefixtures("poisoned")
def test_kernel_equals_reference(
    queries, keys, head_dim, scales, device, attention_problem, generator
):
    mask = scales != "per_head"
    p = attention_problem(queries, keys, head_dim, generator, scales=scales, mask=mask)
    got = strict(*arguments(p, device), torch.float32)
    expected = reference.attention_qk_int8_pv_int8(*arguments(p), torch.float32)
    assert got.stride() == expected.stride()
    bound = bound_of(p)
    assert bound.count_nonzero() <= 0.05 * bound.numel()  # nearly all are compared bit for bit
    assert_within(got, expected, bound)


@pytest.mark.parametrize("config", [(16, 64, 4, 2), (64, 32, 4, 2)])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_tiles_do_not_change_a_bit(config, mask, device, attention_problem, generator):
    """One tile for all keys; several, the last one partial."""
    p = attention_problem(20, 100, 72, generator, mask=mask, batch=1)
    one_tile = AttentionConfig(16, 128, 4, 2)
    expected = strict(*arguments(p, device), torch.float32, config=one_tile)
    config = AttentionConfig(*config)
    got = strict(*arguments(p, device), torch.float32, config=config)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_output_types(out_dtype, device, attention_problem, generator):
    p = attention_problem(3, 40, 64, generator)
    got = strict(*arguments(p, device), out_dtype)
    assert got.dtype == out_dtype
    expected = reference.attention_qk_int8_pv_int8(*arguments(p), out_dtype)
    assert_within(got, expected, bound_of(p), out_dtype)


@pytest.mark.parametrize("keys", [20, 70])  # one pass, two passes
@pytest.mark.parametrize("scales", ["static", "per_token"])
@pytest.mark.usefixtures("poisoned")
def test_an_image_without_keys_gives_zeros(keys, scales, device, attention_problem, generator):
    p = attention_problem(3, keys, 32, generator, scales=scales)
    p["key_mask"][1] = False
    got = strict(*arguments(p, device), torch.float32).cpu()
    for o in (got, reference.attention_qk_int8_pv_int8(*arguments(p), torch.float32)):
        assert o[1].count_nonzero() == 0
        assert o[0].isfinite().all()
        assert o[0].count_nonzero() == o[0].numel()


@pytest.mark.parity("P3")
@pytest.mark.parametrize("keys", [40, 300])
@pytest.mark.usefixtures("poisoned")
def test_code_sums_are_exact(keys, device, attention_problem, generator):
    """Constant values come back only if numerator and denominator count the same codes."""
    p = attention_problem(6, keys, 32, generator, batch=1, heads=1, scales="static")
    p["v"] = torch.full_like(p["v"], -128)
    p["v_zero_point"] = torch.tensor([-127], dtype=torch.int32)  # v - zero_point = -1
    p["v_scale"] = torch.ones(1)
    got = strict(*arguments(p, device), torch.float32).cpu()
    # -sum(code) * (1 / sum(code)): two roundings
    torch.testing.assert_close(got, torch.full_like(got, -1), rtol=2.0**-23, atol=0)


@pytest.mark.usefixtures("poisoned")
def test_equal_logits_at_the_extremes(device):
    """40 keys of code 255 on v - zero_point = -255, with logits up to 2**61."""
    q = torch.full((1, 1, 2, 128), -128, dtype=torch.int8, device=device)
    keys = torch.full((1, 1, 40, 128), -128, dtype=torch.int8, device=device)
    zero, one = torch.tensor([127], dtype=torch.int32, device=device), torch.ones(1, device=device)
    for scale in (2.0**-20, 1.0, 2.0**40):
        step = torch.full((1,), scale, device=device)
        o = strict(q, keys, keys, step, one, one, zero, 1.0, None, torch.float32)
        torch.testing.assert_close(o, torch.full_like(o, -255), rtol=2.0**-22, atol=0)


@pytest.mark.usefixtures("poisoned")
def test_views_of_a_projection(device, generator):
    """[B, T, 3, H, D] memory, without copies."""
    fused = torch.randint(-128, 128, (2, 21, 3, 2, 72), generator=generator, dtype=torch.int8)
    q, keys, v = fused.to(device).permute(2, 0, 3, 1, 4)
    step, zero = torch.full((1,), 0.01, device=device), torch.tensor([4], device=device).int()
    rest = (step, step, step, zero, 0.1, None, torch.float32)
    got = strict(q, keys, v, *rest)
    assert torch.equal(got, strict(q.contiguous(), keys.contiguous(), v.contiguous(), *rest))
    assert got.transpose(1, 2).is_contiguous()


# tiles of 32 keys; memory of whole tiles, of whole 16 bytes, and of neither, which is copied first
@pytest.mark.parametrize(("keys", "memory_keys"), [(32, 32), (40, 64), (37, 48), (40, 40)])
@pytest.mark.usefixtures("poisoned")
def test_values_with_tokens_inside(
    keys, memory_keys, device, attention_problem, generator, monkeypatch
):
    p = attention_problem(5, keys, 72, generator, mask=keys == 37, heads=1)
    expected = strict(*arguments(p, device), torch.float32)
    memory = torch.full((2, 1, 72, memory_keys), -128, dtype=torch.int8)
    memory[..., :keys] = p["v"].mT
    p["v"] = memory.to(device)[..., :keys].mT
    if memory_keys != 40:
        monkeypatch.setattr(kernel.transpose_v, "launch", None)  # read as they are
    assert torch.equal(strict(*arguments(p, device), torch.float32), expected)


@pytest.mark.usefixtures("poisoned")
def test_wide_rows_of_queries_and_keys(device, attention_problem, generator):
    """D = 72 in rows of 96, as a projection may write them."""
    p = attention_problem(5, 33, 72, generator, batch=1)
    expected = strict(*arguments(p, device), torch.float32)
    for name in "qk":
        wide = torch.full((*p[name].shape[:3], 96), -128, dtype=torch.int8)
        wide[..., :72] = p[name]
        p[name] = wide[..., :72]
    assert torch.equal(strict(*arguments(p, device), torch.float32), expected)


@pytest.mark.usefixtures("poisoned")
def test_codes_of_the_outputs(device, attention_problem, generator):
    """Exactly the quantizer of the fp32 outputs, as the next linear reads them; some clamp."""
    p = attention_problem(18, 33, 72, generator, batch=1)
    p["v_zero_point"].zero_()
    y = strict(*arguments(p, device), torch.float32)
    scale, zero_point = torch.tensor([0.004]), torch.tensor([-9], dtype=torch.int32)
    for smooth_inv in (None, torch.rand(144, generator=generator) + 0.5):
        codes = [x if x is None else x.to(device) for x in (scale, zero_point, smooth_inv)]
        got = strict(*arguments(p, device), torch.float32, *codes)
        assert got.transpose(1, 2).is_contiguous()
        rows = y.cpu().transpose(1, 2).reshape(18, 144)
        expected = k.quantize_static(rows, scale, zero_point, smooth_inv)
        assert torch.equal(got.cpu().transpose(1, 2).reshape(18, 144), expected)
        assert 0 < (expected == 127).sum() < expected.numel() / 2


@pytest.mark.parametrize("run", [strict, reference.attention_qk_int8_pv_int8])
@pytest.mark.usefixtures("poisoned")
def test_a_value_scale_for_each_image_and_head(run, device, attention_problem, generator):
    """A batch equals its images alone, each with its own scale per head."""
    p = attention_problem(5, 40, 64, generator, scales="per_head")
    p["v_scale"] = torch.tensor([[0.5, 0.01], [0.02, 3.0]])
    together = run(*arguments(p, device), torch.float32)
    for image in range(2):
        one = {n: p[n][image : image + 1] for n in ("q", "k", "v", "key_mask")}
        alone = p | one | {"v_scale": p["v_scale"][image]}
        got = run(*arguments(alone, device), torch.float32)
        assert torch.equal(got, together[image : image + 1])


def test_no_queries(device, attention_problem, generator):
    p = attention_problem(0, 8, 64, generator)
    assert strict(*arguments(p, device), torch.float32).shape == (2, 2, 0, 64)
    assert reference.attention_qk_int8_pv_int8(*arguments(p), torch.float32).numel() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [256, 300, 1024])
def test_codes_and_values_with_tokens_inside_on_gpu(keys, attention_problem, generator):
    p = attention_problem(64, keys, 72, generator, heads=16, scales="per_head")
    *positional, zero_point, softmax_scale, key_mask = arguments(p, "cuda")
    rest = {"v_zero_point": zero_point, "softmax_scale": softmax_scale, "key_mask": key_mask}
    y = k.attention_qk_int8_pv_int8(*positional, **rest)
    memory = torch.full((2, 16, 72, 1024), -128, dtype=torch.int8, device="cuda")
    memory[..., :keys] = positional[2].mT
    positional[2] = memory[..., :keys].mT
    assert torch.equal(k.attention_qk_int8_pv_int8(*positional, **rest), y)
    codes = (
        torch.tensor([0.01], device="cuda"),
        torch.tensor([3], dtype=torch.int32, device="cuda"),
    )
    got = k.attention_qk_int8_pv_int8(
        *positional, **rest, out_scale=codes[0], out_zero_point=codes[1]
    )
    expected = k.quantize_static(y.transpose(1, 2).flatten(0, 1).flatten(1), *codes)
    assert torch.equal(got.transpose(1, 2).flatten(0, 1).flatten(1), expected)


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
    *positional, zero_point, softmax_scale, key_mask = arguments(p, "cuda")
    got = k.attention_qk_int8_pv_int8(
        *positional, v_zero_point=zero_point, softmax_scale=softmax_scale, key_mask=key_mask,
        out_dtype=out_dtype,
    )  # fmt: skip
    expected = reference.attention_qk_int8_pv_int8(*arguments(p), out_dtype)
    assert_within(got, expected, bound_of(p), out_dtype)
