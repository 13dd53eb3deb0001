"""GEMMs that do the next thing too: add to the residual stream, gated or not, or GELU and quantize.

They take int8 (`W8`), progressive int4 (`W4P`) or int4 weights with real groups (`W4G`). Results of the GEMM stay fp32
until the end: nothing is rounded to half precision in between.
"""

from typing import Any

import torch

from ditq_kernels.checks import gemm as checks_gemm
from ditq_kernels.checks import tensors as checks
from ditq_kernels.codes.weights import W4P, W8
from ditq_kernels.codes.weights_w4g import W4G
from ditq_kernels.ops import dispatch

Weight = W8 | W4P | W4G
Parts = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def gemm_residual(
    q: torch.Tensor,
    weight: Weight,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor,
    gate: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear layer whose result is gated and added to the residual stream (adaLN-Zero; DiT, arXiv:2212.09748).

    y = residual + gate[sample of the row] * gemm: the product is one fp32 rounding, the sum another, then the cast.
    Without a gate y = residual + gemm (the cross-attention of PixArt, arXiv:2310.00426).

    Args:
        q: [T, K] int8, rows contiguous. Activation codes.
        weight: of the layer, [N, K].
        scale: [T] or [1] fp32. Activation step.
        bias: as in `gemm_w8a8`.
        residual: [T, N] fp32 | fp16 | bf16, rows contiguous.
        gate: [B, N] fp32, rows contiguous; B divides T, and sample b is rows b * T / B and on. Absent: none.
        zero_point: as in `gemm_w8a8`.
        weight_sum: as in `gemm_w8a8`.
        bias_index: as in `gemm_w8a8`.
        lora_x: as in `gemm_w8a8`.
        lora_up: as in `gemm_w8a8`.

    Returns:
        [T, N] in the dtype of `residual`, contiguous; `residual` itself is left alone.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or K too large for an int32 sum.
    """
    parts = parts_of(weight)
    stages = (scale, weight.scale, bias, zero_point, weight_sum, bias_index, lora_x, lora_up)
    arguments = (q, *parts, residual, gate, *stages)
    if (made := dispatch.gemm_residual.by_plan(arguments)) is not None:
        return made
    op = "gemm_residual"
    check_layer(op, q, weight, stages)
    shape = (q.shape[0], parts[0].shape[0])
    checks.check_matrix(op, "residual", residual, checks.FLOATS, "[T, N]")
    named = [("residual", residual, shape[0])]
    if gate is not None:
        checks.check_matrix(op, "gate", gate, (torch.float32,), "[B, N]")
        checks_gemm.check_samples(op, "gate", gate.shape[0], shape[0])
        named.append(("gate", gate, gate.shape[0]))
    for name, tensor, rows in named:
        checks.check_device(op, name, tensor, q)
        if tensor.shape != (rows, shape[1]):
            raise ValueError(
                f"{op}: {name} must be [{rows}, {shape[1]}] as the layer's result, got "
                f"{list(tensor.shape)}; pass that of this layer"
            )
    return dispatch.gemm_residual(*arguments)


def gemm_gelu_quantize(
    q: torch.Tensor,
    weight: Weight,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_scale: torch.Tensor,
    out_zero_point: torch.Tensor,
    out_smooth_inv: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear layer, GELU in its tanh form (arXiv:1606.08415), and the static quantizer of the next layer.

    out = out_zero_point + round(gelu(gemm) * out_smooth_inv / out_scale), clamped to [-128, 127], as `quantize_static`
    does it. GELU is within 2**-21 of |gemm|, so a code may differ by one from device to device where the quotient lies
    that near to a half-integer.

    A scale per token cannot be fused here: it needs the largest of all N values of a token, and those are computed by
    N / tile programs that do not wait for each other. Use `gelu_quantize_per_token` after the GEMM for that.

    Args:
        q: [T, K] int8, rows contiguous. Activation codes.
        weight: of the layer, [N, K].
        scale: [T] or [1] fp32. Activation step.
        bias: as in `gemm_w8a8`.
        out_scale: [1] fp32, positive. Step of the codes, in units of the GELU times out_smooth_inv.
        out_zero_point: [1] int32 in [-128, 127]. The stored code of 0.0.
        out_smooth_inv: [N] fp32. The smoothing of the next layer; absent means none.
        zero_point: as in `gemm_w8a8`.
        weight_sum: as in `gemm_w8a8`.
        bias_index: as in `gemm_w8a8`.
        lora_x: as in `gemm_w8a8`.
        lora_up: as in `gemm_w8a8`.

    Returns:
        [T, N] int8, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or layout, or K too large for an int32 sum.
    """
    parts = parts_of(weight)
    stages = (scale, weight.scale, bias, zero_point, weight_sum, bias_index, lora_x, lora_up)
    arguments = (q, *parts, out_scale, out_zero_point, out_smooth_inv, *stages)
    if (made := dispatch.gemm_gelu_quantize.by_plan(arguments)) is not None:
        return made
    op = "gemm_gelu_quantize"
    check_layer(op, q, weight, stages)
    checks.check_vector(op, "out_scale", out_scale, torch.float32, (1,), like=q)
    checks.check_vector(op, "out_zero_point", out_zero_point, torch.int32, (1,), like=q)
    if out_smooth_inv is not None:
        lengths = (parts[0].shape[0],)
        checks.check_vector(op, "out_smooth_inv", out_smooth_inv, torch.float32, lengths, like=q)
    return dispatch.gemm_gelu_quantize(*arguments)


def parts_of(weight: Weight) -> Parts:
    """The weights as ops take them; the scale of the weights travels in the stages.

    Returns:
        codes, group_scale, group_offset: of `W8` only codes; of `W4P` all; of `W4G` no group_scale, and in the place
        of the offset the zero point of each group.
    """
    if isinstance(weight, W4G):
        return weight.packed, None, weight.weight_zero
    if isinstance(weight, W4P):
        return weight.packed, weight.group_scale, weight.group_offset
    return weight.qweight, None, None


def check_layer(op: str, q: torch.Tensor, weight: Weight, stages: tuple[Any, ...]) -> None:
    """Checks of all that GEMMs of any weights share; stages from the scale of the activations on."""
    checks.check_matrix(op, "q", q, (torch.int8,), "[T, K]")
    check_stages, codes_a_byte = checks_gemm.check_epilogue, 2
    if isinstance(weight, W4G):
        checks.check_real_groups(op, weight.packed, weight.scale, weight.weight_zero, like=q)
        check_stages = checks_gemm.check_epilogue_of_groups
    elif isinstance(weight, W4P):
        checks.check_groups(op, weight.packed, weight.group_scale, weight.group_offset, like=q)
    else:
        checks.check_matrix(op, "weight", weight.qweight, (torch.int8,), "[N, K]")
        checks.check_device(op, "weight", weight.qweight, q)
        codes_a_byte = 1
    codes = parts_of(weight)[0]
    checks.check_inner(op, codes_a_byte * codes.shape[1], q.shape[1], "weight")
    check_stages(op, q, codes.shape[0], *stages)
