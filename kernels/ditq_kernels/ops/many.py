"""Several layers of one quantized input in one launch."""

from collections.abc import Sequence
from typing import Any

import torch

from ditq_kernels.checks import many as checks_many
from ditq_kernels.checks import tensors as checks
from ditq_kernels.ops import dispatch
from ditq_kernels.ops.gemm_fused import Weight, check_layer, parts_of


def gemm_many(
    q: torch.Tensor,
    weights: Sequence[Weight],
    scale: torch.Tensor,
    biases: Sequence[torch.Tensor] | None = None,
    *,
    zero_point: torch.Tensor | None = None,
    weight_sums: Sequence[torch.Tensor] | None = None,
    bias_index: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, ...]:
    """Linear layers that read one quantized input, such as the queries, keys and values of an attention.

    Each result has the bits of the layer's own GEMM, such as `gemm_w8a8`. The weights stay where they are: nothing is
    concatenated. On CUDA it is one launch, whose programs take the pointers of the layer they work for. No low-rank
    branches.

    Args:
        q: [T, K] int8, rows contiguous. Activation codes.
        weights: of 1 to 8 layers, layer i [N_i, K], contiguous, of one kind and group size.
        scale: [T] or [1] fp32. Activation step.
        biases: of each layer [N_i] fp32, in units of its result; [G, N_i] with bias_index. Absent: of none.
        zero_point: as in `gemm_w8a8`.
        weight_sums: the `weight_sum` of each layer, see `gemm_w8a8`; goes with zero_point.
        bias_index: as in `gemm_w8a8`, of all layers.
        out_dtype: fp32 | fp16 | bf16, rounded to nearest even.

    Returns:
        [T, N_i] out_dtype of each layer, contiguous.

    Raises:
        ValueError: a wrong number, shape, dtype, device or layout, or K too large for an int32 sum.
    """
    parts = [parts_of(weight) for weight in weights]
    codes = [part[0] for part in parts]
    group_scales = [part[1] for part in parts if part[1] is not None]
    group_offsets = [part[2] for part in parts if part[2] is not None]
    scales = [weight.scale for weight in weights]
    offsets, sums = list(biases or ()), list(weight_sums or ())
    arguments = (
        q, codes, group_scales, group_offsets, scale, scales, offsets, zero_point, sums, bias_index, out_dtype,
    )  # fmt: skip
    given = (
        q, *codes, None, *group_scales, None, *group_offsets, None, scale, *scales, None, *offsets, None,
        zero_point, *sums, None, bias_index, out_dtype,
    )  # fmt: skip
    if (made := dispatch.gemm_many.by_plan(arguments, given)) is not None:
        return tuple(made)
    op = "gemm_many"
    checks_many.check_count(op, len(parts), biases=biases, weight_sums=weight_sums)
    for i, weight in enumerate(weights):
        bias, weight_sum = (each and each[i] for each in (biases, weight_sums))
        stages: tuple[Any, ...] = (
            scale,
            weight.scale,
            bias,
            zero_point,
            weight_sum,
            bias_index,
            None,
            None,
        )
        check_layer(op, q, weight, stages)
        checks_many.check_alike(op, parts[0], parts[i])
    checks.check_out_dtype(op, out_dtype)
    return tuple(dispatch.gemm_many(*arguments))
