"""Arithmetic on tensors for low-bit Diffusion Transformers. Knows no model, file or timestep.

    import ditq_kernels as k

    q, scale = k.quantize_per_token(x)  # [T, K] float -> int8 [T, K], fp32 [T]
    w = k.quantize_weight_w8(weight)  # [N, K] float -> int8 [N, K], fp32 [N]
    y = k.gemm_w8a8(q, w.qweight, scale, w.scale)  # [T, N]

Importing loads neither Triton nor CUDA.
"""

from ditq_kernels.codes.numerics import (
    INT8_LEVELS,
    INT8_MAX,
    MIN_SCALE,
    asymmetric_scale,
    dequantize,
    quantize_asymmetric,
    quantize_symmetric,
    symmetric_scale,
)
from ditq_kernels.codes.packing import expand_w4g, expand_w4p, pack_int4, unpack_int4
from ditq_kernels.codes.weights import (
    W4P,
    W8,
    quantize_weight_w4p,
    quantize_weight_w8,
    resolve_group_size,
)
from ditq_kernels.codes.weights_w4g import W4G, dequantize_w4g, fits_w4g, quantize_weight_w4g
from ditq_kernels.launch.backend import backend_of, choose_backend
from ditq_kernels.launch.prepared import copied_bytes, keep_copies, keeps_copies
from ditq_kernels.ops.attention import attention_qk_int8_pv_bf16, attention_qk_int8_pv_int8
from ditq_kernels.ops.expand import w4_expand
from ditq_kernels.ops.gemm_fused import gemm_gelu_quantize, gemm_residual
from ditq_kernels.ops.heads import quantize_heads
from ditq_kernels.ops.linear import (
    gemm_w4a8,
    gemm_w8a8,
    linear_w4,
    linear_w8,
    lora_down,
)
from ditq_kernels.ops.many import gemm_many
from ditq_kernels.ops.per_group import gemm_w4a8_per_group, linear_w4_per_group
from ditq_kernels.ops.qkv_fused import gemm_qkv_quantize
from ditq_kernels.ops.quantize import quantize_per_token, quantize_static
from ditq_kernels.ops.row_fused import adaln_quantize, gelu_quantize

__all__ = [
    "INT8_LEVELS",
    "INT8_MAX",
    "MIN_SCALE",
    "W4G",
    "W4P",
    "W8",
    "adaln_quantize",
    "asymmetric_scale",
    "attention_qk_int8_pv_bf16",
    "attention_qk_int8_pv_int8",
    "backend_of",
    "choose_backend",
    "copied_bytes",
    "dequantize",
    "dequantize_w4g",
    "expand_w4g",
    "expand_w4p",
    "fits_w4g",
    "gelu_quantize",
    "gemm_gelu_quantize",
    "gemm_many",
    "gemm_qkv_quantize",
    "gemm_residual",
    "gemm_w4a8",
    "gemm_w4a8_per_group",
    "gemm_w8a8",
    "keep_copies",
    "keeps_copies",
    "linear_w4",
    "linear_w4_per_group",
    "linear_w8",
    "lora_down",
    "pack_int4",
    "quantize_asymmetric",
    "quantize_heads",
    "quantize_per_token",
    "quantize_static",
    "quantize_symmetric",
    "quantize_weight_w4g",
    "quantize_weight_w4p",
    "quantize_weight_w8",
    "resolve_group_size",
    "symmetric_scale",
    "unpack_int4",
    "w4_expand",
]
