"""Ops on processors that multiply int8 faster than fp32: torch's int8 GEMMs, the reference's epilogue in blocks."""

from ditq_kernels._cpu.gemm import (
    gemm_gelu_quantize,
    gemm_many,
    gemm_qkv_quantize,
    gemm_residual,
    gemm_w4a8,
    gemm_w4a8_per_group,
    gemm_w8a8,
)

__all__ = [
    "gemm_gelu_quantize",
    "gemm_many",
    "gemm_qkv_quantize",
    "gemm_residual",
    "gemm_w4a8",
    "gemm_w4a8_per_group",
    "gemm_w8a8",
]
