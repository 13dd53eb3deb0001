"""Ops on processors with int8 dot products: torch's int8 GEMM, and the reference's epilogue in blocks of rows."""

from ditq_kernels._cpu.gemm import (
    gemm_gelu_quantize,
    gemm_qkv_quantize,
    gemm_residual,
    gemm_w4a8,
    gemm_w8a8,
)

__all__ = ["gemm_gelu_quantize", "gemm_qkv_quantize", "gemm_residual", "gemm_w4a8", "gemm_w8a8"]
