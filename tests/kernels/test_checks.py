"""Each refusal at the public edge: one sentence with op, expected, got and remedy."""

import re

import pytest
import torch

import ditq_kernels as k
from ditq_kernels.checks import attention as checks_attention
from ditq_kernels.checks import tensors as checks


def gemm_arguments():
    return {
        "q": torch.zeros(4, 64, dtype=torch.int8),
        "weight": torch.zeros(8, 64, dtype=torch.int8),
        "scale": torch.ones(4),
        "weight_scale": torch.ones(8),
    }


def w4_arguments():
    return {
        "q": torch.zeros(4, 64, dtype=torch.int8),
        "packed": torch.zeros(8, 32, dtype=torch.uint8),
        "scale": torch.ones(4),
        "group_scale": torch.ones(8, 2, dtype=torch.uint8),
        "group_offset": torch.zeros(8, 2, dtype=torch.int8),
        "weight_scale": torch.ones(8),
    }


def test_the_examples_are_legal():
    assert k.gemm_w8a8(**gemm_arguments()).shape == (4, 8)
    assert k.gemm_w4a8(**w4_arguments()).shape == (4, 8)


# never touched: four rows whose pages are not there
FAR = torch.empty(3 * 2**23 + 64, dtype=torch.int8).as_strided((4, 64), (2**23, 1))
W8_REFUSALS = [
    ({"q": torch.zeros(2, 4, 64, dtype=torch.int8)}, "q must be [T, K] int8, got [2, 4, 64] int8"),
    ({"q": torch.zeros(4, 64)}, "q must be [T, K] int8, got [4, 64] float32"),
    ({"q": torch.zeros(4, 0, dtype=torch.int8)}, "q must have columns, got [4, 0] int8"),
    ({"q": torch.zeros(64, 4, dtype=torch.int8).t()}, "rows of q must be contiguous"),
    ({"q": FAR}, "rows of q must be at most 8388607 elements apart, got strides (8388608, 1)"),
    ({"weight": torch.zeros(8, 64, dtype=torch.uint8)}, "weight must be [N, K] int8"),
    ({"weight": torch.zeros(8, 32, dtype=torch.int8)}, "must share K, got K=64 and K=32"),
    ({"weight": torch.zeros(8, 64, dtype=torch.int8, device="meta")}, "must be on cpu"),
    ({"scale": torch.ones(3)}, "scale must be [4] or [1] float32, got [3] float32"),
    ({"scale": torch.ones(4).half()}, "scale must be [4] or [1] float32, got [4] float16"),
    ({"scale": torch.ones(8)[::2]}, "scale must be contiguous, got stride 2"),
    ({"weight_scale": torch.ones(8, 1)}, "weight_scale must be [8] float32, got [8, 1] float32"),
    ({"bias": torch.ones(8).bfloat16()}, "bias must be [8] float32, got [8] bfloat16"),
    ({"zero_point": torch.zeros(1, dtype=torch.int32)}, "weight_sum is missing"),
    ({"weight_sum": torch.zeros(8, dtype=torch.int32)}, "zero_point is missing"),
    (
        {"zero_point": torch.zeros(2, dtype=torch.int32), "weight_sum": torch.zeros(8).int()},
        "zero_point must be [4] or [1] int32, got [2] int32",
    ),
    (
        {"zero_point": torch.zeros(1, dtype=torch.int32), "weight_sum": torch.zeros(8)},
        "weight_sum must be [8] int32, got [8] float32",
    ),
    ({"out_dtype": torch.float64}, "out_dtype must be float32 | float16 | bfloat16"),
]


@pytest.mark.parametrize(("change", "sentence"), W8_REFUSALS)
def test_gemm_w8a8_refuses(change, sentence):
    with pytest.raises(ValueError, match=f"^gemm_w8a8: .*{re.escape(sentence)}.*; "):
        k.gemm_w8a8(**gemm_arguments() | change)


W4_REFUSALS = [
    ({"packed": torch.zeros(8, 32, dtype=torch.int8)}, "packed must be [N, K / 2] uint8"),
    ({"packed": torch.zeros(8, 16, dtype=torch.uint8)}, "must be a whole multiple of 32, got K=32"),
    ({"q": torch.zeros(4, 128, dtype=torch.int8)}, "must share K, got K=128 and K=64"),
    ({"group_scale": torch.ones(7, 2, dtype=torch.uint8)}, "group_scale must be [N, J] with N=8"),
    ({"group_offset": torch.ones(8, 1, dtype=torch.int8)}, "group_offset must be [N, J] with N=8"),
    ({"group_offset": torch.ones(8, 2, dtype=torch.uint8)}, "group_offset must be [N, J] int8"),
    (
        {
            "group_scale": torch.ones(8, 4, dtype=torch.uint8),
            "group_offset": torch.ones(8, 4, dtype=torch.int8),
        },
        "K / J must be a whole multiple of 32, got K=64, J=4; repack",
    ),
    ({"weight_scale": torch.ones(7)}, "weight_scale must be [8] float32, got [7] float32"),
]


@pytest.mark.parametrize(("change", "sentence"), W4_REFUSALS)
def test_gemm_w4a8_refuses(change, sentence):
    with pytest.raises(ValueError, match=f"^gemm_w4a8: .*{re.escape(sentence)}"):
        k.gemm_w4a8(**w4_arguments() | change)


def per_group_arguments():
    return {
        "q": torch.zeros(4, 64, dtype=torch.int8),
        "packed": torch.zeros(8, 32, dtype=torch.uint8),
        "scale": torch.ones(4),
        "weight_scale": torch.ones(8, 2),
        "weight_zero": torch.zeros(8, 2, dtype=torch.uint8),
    }


ZERO = torch.zeros(1, dtype=torch.int32)
PER_GROUP_REFUSALS = [
    ({"packed": torch.zeros(8, 32, dtype=torch.int8)}, "packed must be [N, K / 2] uint8"),
    ({"q": torch.zeros(4, 128, dtype=torch.int8)}, "must share K, got K=128 and K=64"),
    ({"weight_scale": torch.ones(8)}, "weight_scale must be [N, J] float32, got [8] float32"),
    ({"weight_scale": torch.ones(7, 2)}, "weight_scale must be [N, J] with N=8"),
    ({"weight_zero": torch.zeros(8, 1, dtype=torch.uint8)}, "weight_zero must be [N, J] with N=8"),
    ({"weight_zero": torch.zeros(8, 2, dtype=torch.int8)}, "weight_zero must be [N, J] uint8"),
    ({"weight_zero": torch.zeros(8, 2, dtype=torch.uint8, device="meta")}, "must be on cpu"),
    (
        {"weight_scale": torch.ones(8, 4), "weight_zero": torch.zeros(8, 4, dtype=torch.uint8)},
        "K / J must be a whole multiple of 32, or J must be 1, got K=64, J=4; repack",
    ),
    ({"scale": torch.ones(3)}, "scale must be [4] or [1] float32, got [3] float32"),
    ({"bias": torch.ones(7)}, "bias must be [8] float32, got [7] float32"),
    ({"zero_point": ZERO}, "weight_sum is missing"),
    ({"zero_point": ZERO, "weight_sum": torch.zeros(8).int()}, "weight_sum must be [N, J] int32"),
    (
        {"zero_point": ZERO, "weight_sum": torch.zeros(8, 1).int()},
        "weight_sum must be [N, J] = [8, 2] like weight_scale, got [8, 1]; take W4G.weight_sum()",
    ),
    (
        {"zero_point": torch.zeros(2).int(), "weight_sum": torch.zeros(8, 2).int()},
        "zero_point must be [4] or [1] int32, got [2] int32",
    ),
    ({"out_dtype": torch.float64}, "out_dtype must be float32 | float16 | bfloat16"),
]


@pytest.mark.parametrize(("change", "sentence"), PER_GROUP_REFUSALS)
def test_gemm_w4a8_per_group_refuses(change, sentence):
    assert k.gemm_w4a8_per_group(**per_group_arguments()).shape == (4, 8)
    with pytest.raises(ValueError, match=f"^gemm_w4a8_per_group: .*{re.escape(sentence)}"):
        k.gemm_w4a8_per_group(**per_group_arguments() | change)


def test_linear_w4_per_group_refuses():
    x, w = torch.zeros(2, 64), k.quantize_weight_w4g(torch.ones(8, 64), 32)
    with pytest.raises(ValueError, match=r"^linear_w4_per_group: x must be \[B, K\] float32"):
        k.linear_w4_per_group(x.double(), w.packed, w.scale, w.weight_zero)
    with pytest.raises(ValueError, match=r"^linear_w4_per_group: .* must share K, got K=32 and"):
        k.linear_w4_per_group(x[:, :32], w.packed, w.scale, w.weight_zero)
    with pytest.raises(ValueError, match=r"^linear_w4_per_group: bias must be \[8\] float32"):
        k.linear_w4_per_group(x, w.packed, w.scale, w.weight_zero, torch.ones(7))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_k_beyond_int32_is_refused(asymmetric):
    limit = checks.MAX_K_ASYMMETRIC if asymmetric else checks.MAX_K_SYMMETRIC
    change = {
        "q": torch.zeros(4, limit + 1, dtype=torch.int8),
        "weight": torch.zeros(8, limit + 1, dtype=torch.int8),
    }
    if asymmetric:
        change["zero_point"] = torch.zeros(1, dtype=torch.int32)
        change["weight_sum"] = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"K must be at most {limit} .* got K={limit + 1}; split"):
        k.gemm_w8a8(**gemm_arguments() | change)


def test_bounds_are_those_of_int32():
    assert checks.MAX_K_SYMMETRIC * 128 * 128 < 2**31 <= (checks.MAX_K_SYMMETRIC + 1) * 128 * 128
    assert checks.MAX_K_ASYMMETRIC * 255 * 128 < 2**31 <= (checks.MAX_K_ASYMMETRIC + 1) * 255 * 128


def test_quantizers_refuse():
    x, one, zero = torch.zeros(4, 64), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^quantize_per_token: x must be \[T, K\] float32 \| "):
        k.quantize_per_token(x.double())
    with pytest.raises(ValueError, match=r"^quantize_per_token: smooth_inv must be \[64\] float32"):
        k.quantize_per_token(x, torch.ones(63))
    with pytest.raises(ValueError, match=r"^quantize_per_token: K must be at most 131071"):
        k.quantize_per_token(torch.zeros(1, 131072))
    with pytest.raises(
        ValueError, match=r"^quantize_static: scale must be \[1\] or \[H\] where H d.* K=64"
    ):
        k.quantize_static(x, torch.ones(3), zero)
    with pytest.raises(
        ValueError, match=r"^quantize_static: scale must be \[1\] or \[H\] where H d.* \[0\]"
    ):
        k.quantize_static(x, torch.ones(0))
    with pytest.raises(ValueError, match=r"^quantize_static: scale must be \[4\] float32"):
        k.quantize_static(x, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"^quantize_static: zero_point must be \[1\] int32"):
        k.quantize_static(x, one, one)
    with pytest.raises(ValueError, match=r"^quantize_static: rows of x must be contiguous"):
        k.quantize_static(torch.zeros(64, 4).t(), one, zero)


def test_weight_only_linears_refuse():
    x, w = torch.zeros(2, 64), k.quantize_weight_w4p(torch.ones(8, 64), 32)
    with pytest.raises(ValueError, match=r"^linear_w8: .* must share K, got K=64 and K=32"):
        k.linear_w8(x, torch.zeros(8, 32, dtype=torch.int8), w.scale)
    with pytest.raises(ValueError, match=r"^linear_w8: weight must be \[N, K\] int8"):
        k.linear_w8(x, torch.zeros(8, 64), w.scale)
    with pytest.raises(ValueError, match=r"^linear_w4: packed must be \[N, K / 2\] uint8"):
        k.linear_w4(x, w.expand(), w.group_scale, w.group_offset, w.scale)
    with pytest.raises(ValueError, match=r"^linear_w4: bias must be \[8\] float32"):
        k.linear_w4(x, w.packed, w.group_scale, w.group_offset, w.scale, torch.ones(7))


def attention_arguments(pv):
    arguments = {
        "q": torch.zeros(2, 3, 5, 64, dtype=torch.int8),
        "k": torch.zeros(2, 3, 7, 64, dtype=torch.int8),
        "v": torch.zeros(2, 3, 7, 64, dtype=torch.int8 if pv == "int8" else torch.bfloat16),
        "q_scale": torch.ones(1),
        "k_scale": torch.ones(1),
        "softmax_scale": 0.125,
    }
    return arguments | ({"v_scale": torch.ones(3)} if pv == "int8" else {})


HEADLESS = torch.zeros(2, 5, 64, dtype=torch.int8)
TURNED = torch.zeros(2, 3, 64, 5, dtype=torch.int8).mT
GROUPED = torch.zeros(2, 1, 7, 64, dtype=torch.int8)
CODES = {"out_scale": torch.ones(1), "out_zero_point": ZERO}
ATTENTION_REFUSALS = [
    ({"q": HEADLESS}, "q must be [B, H, T, D] int8, got [2, 5, 64] int8; split the heads"),
    ({"q": torch.zeros(2, 3, 5, 64)}, "q must be [B, H, T, D] int8, got [2, 3, 5, 64] float32"),
    ({"q": TURNED}, "rows of q must be contiguous, got strides (960, 320, 1, 5)"),
    ({"k": GROUPED}, "H=3, D=64 as in q and one Tk of at least 1 for k and v, got [2, 1, 7, 64]"),
    ({"k": torch.zeros(2, 3, 7, 32, dtype=torch.int8)}, "k must be [B, H, Tk, D] with B=2, H=3"),
    ({"k": torch.zeros(2, 3, 0, 64, dtype=torch.int8)}, "one Tk of at least 1 for k and v, got"),
    ({"k": torch.zeros(2, 3, 7, 64, dtype=torch.int8, device="meta")}, "k must be on cpu"),
    ({"q_scale": torch.ones(5)}, "q_scale must be float32 of shape [1], [3], [2, 3, 5], got [5]"),
    ({"k_scale": torch.ones(2, 3, 5)}, "of shape [1], [3], [2, 3, 7], got [2, 3, 5] float32"),
    ({"k_scale": torch.ones(3).half()}, "k_scale must be float32 of shape [1], [3], [2, 3, 7]"),
    ({"k_scale": torch.ones(2, 7, 3).mT}, "k_scale must be contiguous, got strides (21, 1, 3)"),
    ({"k_scale": torch.ones(1, device="meta")}, "k_scale must be on cpu"),
    ({"softmax_scale": 0.0}, "softmax_scale must be positive and finite, got 0.0"),
    ({"softmax_scale": float("nan")}, "softmax_scale must be positive and finite, got nan"),
    (
        {"key_mask": torch.zeros(2, 7)},
        "bool, True where a key is attended, got [2, 7] float32; bia",
    ),
    ({"key_mask": torch.ones(2, 3, 5, 7).bool()}, "key_mask must be [B, Tk] = [2, 7] bool"),
    ({"key_mask": torch.ones(7, 2).bool().t()}, "key_mask must be contiguous"),
    ({"out_dtype": torch.int8}, "out_dtype must be float32 | float16 | bfloat16"),
    ({"out_zero_point": ZERO}, "out_zero_point needs out_scale, which is missing"),
    ({"out_smooth_inv": torch.ones(192)}, "out_smooth_inv needs out_scale, which is missing"),
    ({"out_scale": torch.ones(1)}, "out_scale needs out_zero_point, which is missing"),
    (
        CODES | {"out_dtype": torch.bfloat16},
        "out_dtype must be left at its default where out_scale",
    ),
    (CODES | {"out_scale": torch.ones(3)}, "out_scale must be [1] float32, got [3] float32"),
    (CODES | {"out_zero_point": torch.zeros(1)}, "out_zero_point must be [1] int32, got [1] float"),
    (CODES | {"out_smooth_inv": torch.ones(64)}, "out_smooth_inv must be [192] float32, got [64]"),
]
INT8_VALUE_REFUSALS = [
    ({"v": torch.zeros(2, 3, 7, 64)}, "v must be [B, H, T, D] int8, got [2, 3, 7, 64] float32"),
    ({"v": torch.zeros(2, 3, 8, 64, dtype=torch.int8)}, "for k and v, got [2, 3, 8, 64]"),
    ({"v": torch.zeros(2, 3, 7, 128, dtype=torch.int8)[..., ::2]}, "rows of v must be contiguous"),
    ({"v_scale": torch.ones(2, 3, 7)}, "v_scale must be float32 of shape [1], [3], [2, 3], got [2"),
    ({"v_zero_point": torch.ones(3)}, "v_zero_point must be [1] or [3] int32, got [3] float32"),
]


@pytest.mark.parametrize("pv", ["int8", "bf16"])
@pytest.mark.parametrize(("change", "sentence"), ATTENTION_REFUSALS)
def test_attention_refuses(pv, change, sentence):
    op = f"attention_qk_int8_pv_{pv}"
    with pytest.raises(ValueError, match=f"^{op}: .*{re.escape(sentence)}"):
        getattr(k, op)(**attention_arguments(pv) | change)


@pytest.mark.parametrize(("change", "sentence"), INT8_VALUE_REFUSALS)
def test_attention_refuses_values(change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        k.attention_qk_int8_pv_int8(**attention_arguments("int8") | change)


@pytest.mark.parametrize("pv", ["int8", "bf16"])
def test_attention_names_other_head_dimensions(pv):
    change = {name: attention_arguments(pv)[name][..., :40] for name in "qkv"}
    with pytest.raises(NotImplementedError, match=r"one of \(32, .*, 128\), got 40; pad with zero"):
        getattr(k, f"attention_qk_int8_pv_{pv}")(**attention_arguments(pv) | change)


def test_strict_attention_refuses_more_keys_than_int32_can_sum():
    assert (
        checks_attention.MAX_STRICT_KEYS * 255 * 255
        < 2**31
        <= (checks_attention.MAX_STRICT_KEYS + 1) * 255 * 255
    )
    keys = torch.zeros(1, 1, checks_attention.MAX_STRICT_KEYS + 1, 32, dtype=torch.int8)
    change = {"q": keys[:, :, :1], "k": keys, "v": keys, "v_scale": torch.ones(1), "strict": True}
    with pytest.raises(ValueError, match=r"Tk must be at most 33025 .* got Tk=33026; leave"):
        k.attention_qk_int8_pv_int8(**attention_arguments("int8") | change)
