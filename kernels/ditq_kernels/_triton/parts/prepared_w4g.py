"""Int4 weights with a real scale per group in the order the kernel reads; `prepared` makes them once a layer.

Bytes are permuted in spans of inputs whose two halves meet two parts of the activations
(`packing.split_for_kernel`), and the values of a group lie side by side for neighbouring channels.
"""

from dataclasses import dataclass

import torch

from ditq_kernels.codes import packing
from ditq_kernels.launch.prepared import prepared

HALF_MULTIPLE = 32  # one int8 tensor-core instruction consumes 32 inputs


@dataclass(frozen=True)
class PreparedW4G:
    """Int4 weights per group in kernel order. J' is J, rounded up to even where groups go in pairs."""

    split: torch.Tensor  # [N, padded K / 2] uint8, see packing.split_for_kernel
    scale: torch.Tensor  # [J', N] fp32, 0 beyond J
    zero: torch.Tensor  # [J', N] int32: weight_zero in each of its four bytes
    sums: torch.Tensor | None  # [J', N] int32: sum of code - weight_zero
    span: int  # inputs that share bytes: one group (padded), or two


def kernel_span(group_size: int) -> int:
    """Inputs whose codes share bytes: a group, one nibble each half; or two groups, one nibble each.

    Half a span is a multiple of 32, so a group of an odd number of 32 inputs goes with its neighbour.
    A group that is no multiple of 32 (all of an odd K) is padded.
    """
    if group_size % HALF_MULTIPLE:
        return group_size + -group_size % (2 * HALF_MULTIPLE)
    return group_size if group_size % (2 * HALF_MULTIPLE) == 0 else 2 * group_size


def prepared_w4g(
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    weight_sum: torch.Tensor | None,
) -> PreparedW4G:
    """Weights in kernel order, from the cache if they have not changed.

    Raises:
        RuntimeError: they are not prepared yet and a CUDA graph is being captured.
    """
    sums = () if weight_sum is None else (weight_sum,)
    parts = (packed, weight_scale, weight_zero, *sums)
    return prepared("gemm_w4a8_per_group", parts, _prepare)


def _prepare(
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    weight_sum: torch.Tensor | None = None,
) -> PreparedW4G:
    in_features = 2 * packed.shape[1]
    group_size = in_features // weight_scale.shape[1]
    span = kernel_span(group_size)
    missing = -in_features % span // group_size  # one, where an odd number of groups goes in pairs
    scale, zero, sums = (
        None if part is None else torch.nn.functional.pad(part, (0, missing)).t().contiguous()
        for part in (weight_scale, weight_zero.to(torch.int32) * 0x01010101, weight_sum)
    )
    assert scale is not None
    assert zero is not None
    return PreparedW4G(packing.split_for_kernel(packed, span), scale, zero, sums, span)
