"""The `ditq::` ops as torch sees them: default implementation, CUDA kernel, fake. No checks here.

Arguments are those of the public ops in `ops.py`, which document and check them.
"""

import torch

from ditq_kernels.launch.backend import implementation
from ditq_kernels.reference import attention as reference_attention
from ditq_kernels.reference import linear as reference


@torch.library.custom_op("ditq::quantize_per_token", mutates_args=())
def quantize_per_token(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    asymmetric: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `quantize.quantize_per_token`; the zero points of symmetric codes are empty."""
    run = implementation("quantize_per_token", x.device, reference.quantize_per_token)
    return run(x, smooth_inv, group_shift, group_index, asymmetric)


@quantize_per_token.register_fake
def _(x, smooth_inv, group_shift=None, group_index=None, asymmetric=False):
    num_zeros = x.shape[0] if asymmetric else 0
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(num_zeros, dtype=torch.int32),
    )


@torch.library.custom_op("ditq::quantize_static", mutates_args=())
def quantize_static(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    smooth_inv: torch.Tensor | None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `quantize.quantize_static`."""
    run = implementation("quantize_static", x.device, reference.quantize_static)
    return run(x, scale, zero_point, smooth_inv, group_shift, group_index)


@quantize_static.register_fake
def _(x, scale, zero_point, smooth_inv, group_shift=None, group_index=None):
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op("ditq::gemm_w8a8", mutates_args=())
def gemm_w8a8(
    q: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.gemm_w8a8`."""
    run = implementation("gemm_w8a8", q.device, reference.gemm_w8a8)
    return run(
        q, weight, scale, weight_scale, bias, zero_point, weight_sum, out_dtype, bias_index, lora_x,
        lora_up,
    )  # fmt: skip


@gemm_w8a8.register_fake
def _(
    q, weight, scale, weight_scale, bias, zero_point, weight_sum, out_dtype, bias_index=None,
    lora_x=None, lora_up=None,
):  # fmt: skip
    return q.new_empty((q.shape[0], weight.shape[0]), dtype=out_dtype)


@torch.library.custom_op("ditq::gemm_w4a8", mutates_args=())
def gemm_w4a8(
    q: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.gemm_w4a8`."""
    run = implementation("gemm_w4a8", q.device, reference.gemm_w4a8)
    return run(
        q, packed, scale, group_scale, group_offset, weight_scale, bias, zero_point, weight_sum,
        out_dtype, bias_index, lora_x, lora_up,
    )  # fmt: skip


@gemm_w4a8.register_fake
def _(
    q, packed, scale, group_scale, group_offset, weight_scale, bias, zero_point, weight_sum,
    out_dtype, bias_index=None, lora_x=None, lora_up=None,
):  # fmt: skip
    return q.new_empty((q.shape[0], packed.shape[0]), dtype=out_dtype)


@torch.library.custom_op("ditq::lora_down", mutates_args=())
def lora_down(
    q: torch.Tensor,
    down: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
) -> torch.Tensor:
    """See `ops.lora_down`."""
    run = implementation("lora_down", q.device, reference.lora_down)
    return run(q, down, scale, zero_point)


@lora_down.register_fake
def _(q, down, scale, zero_point):
    return q.new_empty((q.shape[0], down.shape[0]), dtype=torch.bfloat16)


@torch.library.custom_op("ditq::linear_w8", mutates_args=())
def linear_w8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See `ops.linear_w8`."""
    run = implementation("linear_w8", x.device, reference.linear_w8)
    return run(x, weight, weight_scale, bias, out_dtype)


@linear_w8.register_fake
def _(x, weight, weight_scale, bias, out_dtype):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


@torch.library.custom_op("ditq::linear_w4", mutates_args=())
def linear_w4(
    x: torch.Tensor,
    packed: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See `ops.linear_w4`."""
    run = implementation("linear_w4", x.device, reference.linear_w4)
    return run(x, packed, group_scale, group_offset, weight_scale, bias, out_dtype)


@linear_w4.register_fake
def _(x, packed, group_scale, group_offset, weight_scale, bias, out_dtype):
    return x.new_empty((x.shape[0], packed.shape[0]), dtype=out_dtype)


@torch.library.custom_op("ditq::attention_qk_int8_pv_int8", mutates_args=())
def attention_qk_int8_pv_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    v_zero_point: torch.Tensor | None,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    out_dtype: torch.dtype,
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    out_smooth_inv: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.attention_qk_int8_pv_int8`."""
    op = "attention_qk_int8_pv_int8"
    run = implementation(op, q.device, reference_attention.attention_qk_int8_pv_int8)
    return run(
        q, k, v, q_scale, k_scale, v_scale, v_zero_point, softmax_scale, key_mask, out_dtype,
        out_scale, out_zero_point, out_smooth_inv,
    )  # fmt: skip


@attention_qk_int8_pv_int8.register_fake
def _(
    q, k, v, q_scale, k_scale, v_scale, v_zero_point, softmax_scale, key_mask, out_dtype, out_scale=None,
    out_zero_point=None, out_smooth_inv=None,
):  # fmt: skip
    return _attention_output(q, out_dtype if out_scale is None else torch.int8)


@torch.library.custom_op("ditq::attention_qk_int8_pv_bf16", mutates_args=())
def attention_qk_int8_pv_bf16(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor,
    softmax_scale: float,
    key_mask: torch.Tensor | None,
    out_dtype: torch.dtype,
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    out_smooth_inv: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.attention_qk_int8_pv_bf16`."""
    op = "attention_qk_int8_pv_bf16"
    run = implementation(op, q.device, reference_attention.attention_qk_int8_pv_bf16)
    return run(
        q, k, v, q_scale, k_scale, softmax_scale, key_mask, out_dtype,
        out_scale, out_zero_point, out_smooth_inv,
    )  # fmt: skip


@attention_qk_int8_pv_bf16.register_fake
def _(
    q, k, v, q_scale, k_scale, softmax_scale, key_mask, out_dtype, out_scale=None,
    out_zero_point=None, out_smooth_inv=None,
):  # fmt: skip
    return _attention_output(q, out_dtype if out_scale is None else torch.int8)


def _attention_output(q, out_dtype):
    batch, heads, num_queries, head_dim = q.shape
    return q.new_empty((batch, num_queries, heads, head_dim), dtype=out_dtype).transpose(1, 2)
