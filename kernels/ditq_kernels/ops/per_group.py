"""Ops on int4 weights with a real scale per group of inputs: public functions, checks and dispatch.

The integer sum of a group is scaled by itself and groups add in fp32, as published group quantizers
define it. `gemm_w4a8` on `w4p` weights sums all of K in integers and is the faster form.
"""

import torch

from ditq_kernels.checks import tensors as checks
from ditq_kernels.checks.gemm import check_bias, check_epilogue_of_groups
from ditq_kernels.ops import dispatch


def gemm_w4a8_per_group(
    q: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    zero_point: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Linear layer on int8 activations and int4 weights with a real scale per group of inputs.

    y = 0; for j ascending: y = y + float(I_j) * weight_scale[:, j]; then y * scale + lora_x @ lora_up.T
    + bias, where I_j = sum over group j of (q - zero_point) * (code - weight_zero) is exact in int32, and
    each other step is one fp32 rounding in this order, without fused multiply-add. Only the low-rank
    product may be summed in another order.

    Args:
        q: [T, K] int8, rows contiguous. Activation codes.
        packed: [N, K / 2] uint8, rows contiguous. Weight codes as `pack_int4` stores them.
        scale: [T] or [1] fp32. Activation step.
        weight_scale: [N, J] fp32. Weight step of each group; K / J a multiple of 32, or J = 1.
        weight_zero: [N, J] uint8 in 0..15. Code of weight 0.0; 8 throughout for symmetric weights.
        bias: [N] fp32, in units of y; [G, N] with bias_index.
        zero_point: [T] or [1] int32 in [-128, 127]. Code of activation 0.0; absent means 0.
        weight_sum: [N, J] int32, sum of code - weight_zero over each group. Needed with zero_point.
        bias_index: as in `gemm_w8a8`.
        lora_x: as in `gemm_w8a8`.
        lora_up: as in `gemm_w8a8`.
        out_dtype: fp32 | fp16 | bf16, rounded to nearest even.

    Returns:
        [T, N] out_dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or a group too large for an int32 sum.
    """
    arguments = (
        q, packed, scale, weight_scale, weight_zero, bias, zero_point, weight_sum, out_dtype,
        bias_index, lora_x, lora_up,
    )  # fmt: skip
    if (made := dispatch.gemm_w4a8_per_group.by_plan(arguments)) is not None:
        return made
    op = "gemm_w4a8_per_group"
    checks.check_matrix(op, "q", q, (torch.int8,), "[T, K]")
    checks.check_real_groups(op, packed, weight_scale, weight_zero, like=q)
    checks.check_inner(op, 2 * packed.shape[1], q.shape[1], "packed")
    check_epilogue_of_groups(
        op, q, packed.shape[0], scale, weight_scale, bias, zero_point, weight_sum, bias_index, lora_x, lora_up
    )  # fmt: skip
    checks.check_out_dtype(op, out_dtype)
    return dispatch.gemm_w4a8_per_group(*arguments)


def linear_w4_per_group(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Linear layer on float activations and int4 weights per group, for modulation (AdaLN) layers.

    y = x @ W.T + bias in fp32 on W = weight_scale * (code - weight_zero). A row fold by a power of two
    commutes exactly. On CUDA this is plain torch (`backend_of` says "torch"): leave TF32 off, as torch
    does by default.

    Args:
        x: [B, K] fp32 | fp16 | bf16, rows contiguous.
        packed: [N, K / 2] uint8, rows contiguous.
        weight_scale: [N, J] fp32; K / J a multiple of 32, or J = 1.
        weight_zero: [N, J] uint8 in 0..15.
        bias: [N] fp32, in units of y.
        out_dtype: fp32 | fp16 | bf16, rounded to nearest even.

    Returns:
        [B, N] out_dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or layout.
    """
    arguments = (x, packed, weight_scale, weight_zero, bias, out_dtype)
    if (made := dispatch.linear_w4_per_group.by_plan(arguments)) is not None:
        return made
    op = "linear_w4_per_group"
    checks.check_matrix(op, "x", x, checks.FLOATS, "[B, K]")
    checks.check_real_groups(op, packed, weight_scale, weight_zero, like=x)
    checks.check_inner(op, 2 * packed.shape[1], x.shape[1], "packed")
    check_bias(op, x, packed.shape[0], bias)
    checks.check_out_dtype(op, out_dtype)
    return dispatch.linear_w4_per_group(*arguments)
