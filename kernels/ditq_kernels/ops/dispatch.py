"""The `ditq::` ops as torch sees them: schema, reference, fake. No checks here.

Arguments are those of the public ops, which document and check them.
"""

import torch

from ditq_kernels.codes import packing
from ditq_kernels.ops.library import define
from ditq_kernels.reference import attention, fused, heads, linear

# what GEMMs with one weight scale an output, and with real groups, do after their sums
STAGES = "Tensor? bias, Tensor? zero_point, Tensor? weight_sum"
BRANCH = "Tensor? bias_index=None, Tensor? lora_x=None, Tensor? lora_up=None"
SHIFT = "Tensor? group_shift=None, Tensor? group_index=None"
GROUPS = "Tensor group_scale, Tensor group_offset, Tensor weight_scale"
# weights as `gemm_fused.parts_of` gives them, then all stages
FUSED = "Tensor q, Tensor weight, Tensor? group_scale, Tensor? group_offset"
LAYER = f"Tensor scale, Tensor weight_scale, {STAGES}, Tensor? bias_index, Tensor? lora_x, Tensor? lora_up"
SCORES = "Tensor q_scale, Tensor k_scale"
OUTPUT = "ScalarType out_dtype, Tensor? out_scale=None, Tensor? out_zero_point=None, Tensor? out_smooth_inv=None"
OUTPUT += ", bool strict=False"


def _codes(x, scale=None, asymmetric=False):
    """Codes, a scale a row unless one is given, a zero point a row if asymmetric."""
    num_scales = x.shape[0] if scale is None else 0
    num_zeros = x.shape[0] if asymmetric else 0
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(num_scales, dtype=torch.float32),
        x.new_empty(num_zeros, dtype=torch.int32),
    )


def _quantize_per_token(x, smooth_inv, group_shift=None, group_index=None, asymmetric=False):
    return _codes(x, None, asymmetric)


quantize_per_token = define(
    f"quantize_per_token(Tensor x, Tensor? smooth_inv, {SHIFT}, bool asymmetric=False) -> (Tensor, Tensor, Tensor)",
    linear,
    _quantize_per_token,
)
quantize_static = define(
    f"quantize_static(Tensor x, Tensor scale, Tensor? zero_point, Tensor? smooth_inv, {SHIFT}) -> Tensor",
    linear,
    lambda x, *_: x.new_empty(x.shape, dtype=torch.int8),
)


def _gelu_quantize(
    x, smooth_inv, scale, zero_point, group_shift=None, group_index=None, asymmetric=False
):
    return _codes(x, scale, asymmetric)


gelu_quantize = define(
    f"gelu_quantize(Tensor x, Tensor? smooth_inv, Tensor? scale, Tensor? zero_point, {SHIFT}, bool asymmetric=False) "
    "-> (Tensor, Tensor, Tensor)",
    fused,
    _gelu_quantize,
)


def _adaln_quantize(
    x, multiplier, shift, eps, smooth_inv, group_shift, group_index, scale, zero_point, values_dtype,
    asymmetric=False,
):  # fmt: skip
    num_values = 0 if values_dtype is None else x.shape[0]
    values = x.new_empty((num_values, x.shape[1]), dtype=values_dtype or torch.float32)
    return *_codes(x, scale, asymmetric), values


adaln_quantize = define(
    "adaln_quantize(Tensor x, Tensor multiplier, Tensor shift, float eps, Tensor? smooth_inv, Tensor? group_shift, "
    "Tensor? group_index, Tensor? scale, Tensor? zero_point, ScalarType? values_dtype, bool asymmetric=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fused,
    _adaln_quantize,
)


def _quantize_heads(x, norm_weight, eps, cos, sin, interleaved, shift, scale):
    batch, tokens, num_heads, head_dim = x.shape
    return (
        x.new_empty((batch, num_heads, tokens, head_dim), dtype=torch.int8),
        x.new_empty((batch if scale is None else 0, num_heads, tokens), dtype=torch.float32),
    )


quantize_heads = define(
    "quantize_heads(Tensor x, Tensor? norm_weight, float eps, Tensor? cos, Tensor? sin, bool interleaved, "
    "Tensor? shift, Tensor? scale) -> (Tensor, Tensor)",
    heads,
    _quantize_heads,
)


def _linear(x, weight, *rest):
    """[T, N] of the first dtype among the other arguments."""
    out_dtype = next(value for value in rest if isinstance(value, torch.dtype))
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


gemm_w8a8 = define(
    f"gemm_w8a8(Tensor q, Tensor weight, Tensor scale, Tensor weight_scale, {STAGES}, ScalarType out_dtype, {BRANCH}) "
    "-> Tensor",
    linear,
    _linear,
)
gemm_w4a8 = define(
    f"gemm_w4a8(Tensor q, Tensor packed, Tensor scale, {GROUPS}, {STAGES}, ScalarType out_dtype, {BRANCH}) -> Tensor",
    linear,
    _linear,
)
gemm_w4a8_per_group = define(
    "gemm_w4a8_per_group(Tensor q, Tensor packed, Tensor scale, Tensor weight_scale, Tensor weight_zero, "
    f"{STAGES}, ScalarType out_dtype, {BRANCH}) -> Tensor",
    linear,
    _linear,
)
lora_down = define(
    "lora_down(Tensor q, Tensor down, Tensor scale, Tensor? zero_point) -> Tensor",
    linear,
    lambda q, down, *_: q.new_empty((q.shape[0], down.shape[0]), dtype=torch.bfloat16),
)
linear_w8 = define(
    "linear_w8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
    linear,
    _linear,
)
linear_w4 = define(
    f"linear_w4(Tensor x, Tensor packed, {GROUPS}, Tensor? bias, ScalarType out_dtype) -> Tensor",
    linear,
    _linear,
)
linear_w4_per_group = define(
    "linear_w4_per_group(Tensor x, Tensor packed, Tensor weight_scale, Tensor weight_zero, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    linear,
    _linear,
)
w4_expand = define(
    "w4_expand(Tensor packed, Tensor group_scale, Tensor group_offset) -> Tensor",
    packing,
    lambda packed, *_: packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.int8),
    function="expand_w4p",
)
gemm_residual = define(
    f"gemm_residual({FUSED}, Tensor residual, Tensor? gate, {LAYER}) -> Tensor",
    fused,
    lambda q, weight, group_scale, group_offset, residual, *_: residual.new_empty(residual.shape),
)
gemm_gelu_quantize = define(
    f"gemm_gelu_quantize({FUSED}, Tensor out_scale, Tensor out_zero_point, Tensor? out_smooth_inv, {LAYER}) -> Tensor",
    fused,
    lambda q, weight, *_: q.new_empty((q.shape[0], weight.shape[0])),
)


def _gemm_qkv_quantize(
    q, weights, group_scales, group_offsets, head_scales, v_zero_point, batch, heads, *_
):
    return fused.new_heads(q, batch, heads, weights[0].shape[0] // heads)


gemm_qkv_quantize = define(
    "gemm_qkv_quantize(Tensor q, Tensor[] weights, Tensor[] group_scales, Tensor[] group_offsets, "
    "Tensor[] head_scales, Tensor? v_zero_point, int batch, int heads, Tensor scale, Tensor[] weight_scales, "
    "Tensor[] biases, Tensor? zero_point, Tensor[] weight_sums, Tensor? bias_index) -> (Tensor, Tensor, Tensor)",
    fused,
    _gemm_qkv_quantize,
)


def _gemm_many(q, weights, *rest):
    return [q.new_empty((q.shape[0], weight.shape[0]), dtype=rest[-1]) for weight in weights]


gemm_many = define(
    "gemm_many(Tensor q, Tensor[] weights, Tensor[] group_scales, Tensor[] group_offsets, Tensor scale, "
    "Tensor[] weight_scales, Tensor[] biases, Tensor? zero_point, Tensor[] weight_sums, Tensor? bias_index, "
    "ScalarType out_dtype) -> Tensor[]",
    fused,
    _gemm_many,
)


def _attention(q, *rest):
    """[B, H, Tq, D] over [B, Tq, H, D] memory; codes where an output scale follows the dtype."""
    at = next(i for i, value in enumerate(rest) if isinstance(value, torch.dtype))
    codes = len(rest) > at + 1 and rest[at + 1] is not None
    out_dtype = torch.int8 if codes else rest[at]
    batch, heads, num_queries, head_dim = q.shape
    return q.new_empty((batch, num_queries, heads, head_dim), dtype=out_dtype).transpose(1, 2)


attention_qk_int8_pv_int8 = define(
    f"attention_qk_int8_pv_int8(Tensor q, Tensor k, Tensor v, {SCORES}, Tensor v_scale, Tensor? v_zero_point, "
    f"float softmax_scale, Tensor? key_mask, {OUTPUT}) -> Tensor",
    attention,
    _attention,
)
attention_qk_int8_pv_bf16 = define(
    f"attention_qk_int8_pv_bf16(Tensor q, Tensor k, Tensor v, {SCORES}, float softmax_scale, Tensor? key_mask, "
    f"{OUTPUT}) -> Tensor",
    attention,
    _attention,
)
