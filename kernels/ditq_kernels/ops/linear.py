"""The front desk: public ops document and check, then torch's dispatcher picks the implementation.

T tokens, K inputs, N outputs. On the CPU an op runs `reference.py`, or torch's int8 product where the processor has
int8 dot products; on CUDA its Triton kernel. All must agree bit for bit. `backend_of` tells which runs. Custom ops are
opaque to torch.compile and safe in CUDA graphs after a warm-up call.
"""

import torch

from ditq_kernels.checks import tensors as checks
from ditq_kernels.checks.gemm import check_channels, check_epilogue
from ditq_kernels.ops import dispatch


def gemm_w8a8(
    q: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    zero_point: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Linear layer on int8 activations and int8 weights, summed in int32, dequantized.

    y = (q @ weight.T - zero_point * weight_sum) * (scale * weight_scale) + lora_x @ lora_up.T + bias:
    the bracket is exact, then each step is one fp32 rounding in this order, without fused multiply-add.
    Only the low-rank product (LoRA, arXiv:2106.09685) may be summed in another order: bf16 factors, fp32 sum.

    Args:
        q: [T, K] int8, rows contiguous. Activation codes.
        weight: [N, K] int8, rows contiguous. Weight codes.
        scale: [T] or [1] fp32. Activation step.
        weight_scale: [N] fp32. Weight step.
        bias: [N] fp32, in units of y; [G, N] with bias_index.
        zero_point: [T] or [1] int32 in [-128, 127]. Code of activation 0.0; absent means 0.
        weight_sum: [N] int32, sum of each weight row. Needed with zero_point.
        bias_index: [B] int64 in 0..G-1, read on the device and not checked. The bias of each sample, where
            sample b is rows b * T / B and on. B divides T; B = T gives each row its own.
        lora_x: [T, R] bf16. What the first factor made of the activations, see `lora_down`.
        lora_up: [N, R] bf16. The second factor.
        out_dtype: fp32 | fp16 | bf16, rounded to nearest even.

    Returns:
        [T, N] out_dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or K too large for an int32 sum.
    """
    arguments = (
        q, weight, scale, weight_scale, bias, zero_point, weight_sum, out_dtype, bias_index, lora_x,
        lora_up,
    )  # fmt: skip
    if (made := dispatch.gemm_w8a8.by_plan(arguments)) is not None:
        return made
    op = "gemm_w8a8"
    checks.check_matrix(op, "q", q, (torch.int8,), "[T, K]")
    checks.check_matrix(op, "weight", weight, (torch.int8,), "[N, K]")
    checks.check_inner(op, weight.shape[1], q.shape[1], "weight")
    checks.check_device(op, "weight", weight, q)
    check_epilogue(
        op, q, weight.shape[0], scale, weight_scale, bias, zero_point, weight_sum, bias_index,
        lora_x, lora_up,
    )  # fmt: skip
    checks.check_out_dtype(op, out_dtype)
    return dispatch.gemm_w8a8(*arguments)


def gemm_w4a8(
    q: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    zero_point: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Linear layer on int8 activations and progressive int4 weights.

    Equals `gemm_w8a8` on `expand_w4p(packed, group_scale, group_offset)`, bit for bit.

    Args:
        q: [T, K] int8, rows contiguous. Activation codes.
        packed: [N, K / 2] uint8, rows contiguous. Weight codes as `pack_int4` stores them.
        scale: [T] or [1] fp32. Activation step.
        group_scale: [N, J] uint8 in 1..17, K / J a multiple of 32. See `quantize_weight_w4p`.
        group_offset: [N, J] int8. Expanded weights must stay inside int8, as our packer ensures.
        weight_scale: [N] fp32. Weight step.
        bias: [N] fp32, in units of y; [G, N] with bias_index.
        zero_point: [T] or [1] int32 in [-128, 127]. Code of activation 0.0; absent means 0.
        weight_sum: [N] int32, sum of each expanded weight row. Needed with zero_point.
        bias_index: as in `gemm_w8a8`.
        lora_x: as in `gemm_w8a8`.
        lora_up: as in `gemm_w8a8`.
        out_dtype: fp32 | fp16 | bf16, rounded to nearest even.

    Returns:
        [T, N] out_dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or K too large for an int32 sum.
    """
    arguments = (
        q, packed, scale, group_scale, group_offset, weight_scale, bias, zero_point, weight_sum,
        out_dtype, bias_index, lora_x, lora_up,
    )  # fmt: skip
    if (made := dispatch.gemm_w4a8.by_plan(arguments)) is not None:
        return made
    op = "gemm_w4a8"
    checks.check_matrix(op, "q", q, (torch.int8,), "[T, K]")
    checks.check_groups(op, packed, group_scale, group_offset, like=q)
    checks.check_inner(op, 2 * packed.shape[1], q.shape[1], "packed")
    check_epilogue(
        op, q, packed.shape[0], scale, weight_scale, bias, zero_point, weight_sum, bias_index,
        lora_x, lora_up,
    )  # fmt: skip
    checks.check_out_dtype(op, out_dtype)
    return dispatch.gemm_w4a8(*arguments)


def lora_down(
    q: torch.Tensor,
    down: torch.Tensor,
    scale: torch.Tensor,
    *,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """First factor of a low-rank branch (LoRA, arXiv:2106.09685; DiTAS, arXiv:2409.07756, Eq. 9) on int8 activations.

    y = (sum over K of (q - zero_point) * down) * scale, in fp32, then bf16. The integers are exact in bf16; the sum
    may be taken in any order.

    Args:
        q: [T, K] int8, rows contiguous. Activation codes.
        down: [R, K] bf16, rows contiguous.
        scale: [T] or [1] fp32. Activation step.
        zero_point: [T] or [1] int32 in [-128, 127]. Code of activation 0.0; absent means 0.

    Returns:
        [T, R] bf16, contiguous: `lora_x` of the GEMMs.

    Raises:
        ValueError: a wrong shape, dtype, device or layout.
    """
    arguments = (q, down, scale, zero_point)
    if (made := dispatch.lora_down.by_plan(arguments)) is not None:
        return made
    op = "lora_down"
    checks.check_matrix(op, "q", q, (torch.int8,), "[T, K]")
    checks.check_matrix(op, "down", down, (torch.bfloat16,), "[R, K]")
    checks.check_inner(op, down.shape[1], q.shape[1], "down")
    checks.check_device(op, "down", down, q)
    lengths = (q.shape[0], 1)
    checks.check_vector(op, "scale", scale, torch.float32, lengths, like=q)
    if zero_point is not None:
        checks.check_vector(op, "zero_point", zero_point, torch.int32, lengths, like=q)
    return dispatch.lora_down(*arguments)


def linear_w8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Linear layer on float activations and int8 weights, for modulation (AdaLN) layers.

    y = (x @ weight.T) * weight_scale + bias in fp32. The scale comes after the sum, so a row fold by
    a power of two commutes exactly. On CUDA fp32 activations are split into three bf16 parts, without a rest,
    and summed in fp32: as accurate as fp32, in another order.

    Args:
        x: [B, K] fp32 | fp16 | bf16, rows contiguous.
        weight: [N, K] int8, rows contiguous.
        weight_scale: [N] fp32.
        bias: [N] fp32, in units of y.
        out_dtype: fp32 | fp16 | bf16, rounded to nearest even.

    Returns:
        [B, N] out_dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or layout.
    """
    arguments = (x, weight, weight_scale, bias, out_dtype)
    if (made := dispatch.linear_w8.by_plan(arguments)) is not None:
        return made
    op = "linear_w8"
    checks.check_matrix(op, "x", x, checks.FLOATS, "[B, K]")
    checks.check_matrix(op, "weight", weight, (torch.int8,), "[N, K]")
    checks.check_inner(op, weight.shape[1], x.shape[1], "weight")
    checks.check_device(op, "weight", weight, x)
    check_channels(op, x, weight.shape[0], weight_scale, bias)
    checks.check_out_dtype(op, out_dtype)
    return dispatch.linear_w8(*arguments)


def linear_w4(
    x: torch.Tensor,
    packed: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Linear layer on float activations and progressive int4 weights, for modulation layers.

    Equals `linear_w8` on `expand_w4p(packed, group_scale, group_offset)`.

    Args:
        x: [B, K] fp32 | fp16 | bf16, rows contiguous.
        packed: [N, K / 2] uint8, rows contiguous.
        group_scale: [N, J] uint8 in 1..17, K / J a multiple of 32.
        group_offset: [N, J] int8.
        weight_scale: [N] fp32.
        bias: [N] fp32, in units of y.
        out_dtype: fp32 | fp16 | bf16, rounded to nearest even.

    Returns:
        [B, N] out_dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or layout.
    """
    arguments = (x, packed, group_scale, group_offset, weight_scale, bias, out_dtype)
    if (made := dispatch.linear_w4.by_plan(arguments)) is not None:
        return made
    op = "linear_w4"
    checks.check_matrix(op, "x", x, checks.FLOATS, "[B, K]")
    checks.check_groups(op, packed, group_scale, group_offset, like=x)
    checks.check_inner(op, 2 * packed.shape[1], x.shape[1], "packed")
    check_channels(op, x, packed.shape[0], weight_scale, bias)
    checks.check_out_dtype(op, out_dtype)
    return dispatch.linear_w4(*arguments)
