"""Triton kernels, one file per op. The only folder that imports triton; loaded on first use."""
