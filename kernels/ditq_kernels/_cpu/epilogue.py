"""From int32 sums to real values as `reference.gemm_w8a8` rounds them, a block of rows at a time.

The reference goes over all [T, N] values once a step, through memory. A block stays in the cache through all steps:
beside a GEMM at int8 speed these passes would cost as much as the product.
"""

from collections.abc import Iterator

import torch

from ditq_kernels.codes.products import ieee_product
from ditq_kernels.reference import linear as reference

BLOCK_ELEMENTS = 2**18  # 1 MiB of fp32
VECTOR = 32  # rows of a block are a multiple: no block ends amid a vector, where torch's GELU rounds apart


def dequantized_blocks(
    total: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias_index: torch.Tensor | None = None,
    lora_x: torch.Tensor | None = None,
    lora_up: torch.Tensor | None = None,
    *,
    into: torch.Tensor | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of a block, and their values [rows, N] in fp32, which the caller may overwrite.

    Args:
        total: [T, N] int32, or integers in fp32 up to 2**24, or sums of `per_group`; contiguous; overwritten.
        scale: as in `ops.gemm_w8a8`, like all that follow.
        weight_scale: the same; None where the sums have it in them.
        bias: the same.
        zero_point: the same.
        weight_sum: the same.
        bias_index: the same.
        lora_x: the same.
        lora_up: the same.
        into: [T, N] fp32, contiguous, total itself if that is fp32. If given, the values are written there, and
            are views of it.
    """
    num_tokens, out_features = total.shape
    branch = None
    if lora_x is not None and lora_up is not None:  # at once: sums of another size may round apart
        branch = ieee_product(lora_x.float(), lora_up.float())
    if bias_index is not None:
        bias_index = reference.by_sample(bias_index, num_tokens)
    step = max(VECTOR, BLOCK_ELEMENTS // max(1, out_features) // VECTOR * VECTOR)
    for start in range(0, num_tokens, step):
        rows = slice(start, start + step)
        sums = total[rows]
        if zero_point is not None and weight_sum is not None:
            sums.sub_(_of_rows(zero_point, rows) * weight_sum)  # fp32: exact terms, so one rounding
        y = sums.float() if into is None or into is total else into[rows].copy_(sums)
        real_step = _of_rows(scale, rows)
        y.mul_(real_step if weight_scale is None else real_step * weight_scale)
        if branch is not None:
            y.add_(branch[rows])
        if bias is not None:
            y.add_(bias if bias_index is None else bias[bias_index[rows]])
        yield rows, y


def _of_rows(values: torch.Tensor, rows: slice) -> torch.Tensor:
    """[T] or [1] as a column for some rows."""
    return (values if len(values) == 1 else values[rows])[:, None]
