"""Int4 weights with a real scale per group as the kernel reads them (`codes.arranged`): as they are, or a kept copy.

Bytes are permuted in spans of inputs whose two halves meet two parts of the activations, and the values of a group lie
side by side for neighbouring channels.
"""

from dataclasses import dataclass

import torch

from ditq_kernels.codes import packing
from ditq_kernels.launch.prepared import prepared


@dataclass(frozen=True)
class PreparedW4G:
    """Int4 weights per group in kernel order. J' is J, rounded up to even where groups go in pairs."""

    split: torch.Tensor  # [N, padded K / 2] uint8, see packing.split_for_kernel
    scale: torch.Tensor  # [N, J'] fp32, 0 beyond J; strides (1, N), as the next two
    zero: torch.Tensor  # [N, J'] uint8
    sums: torch.Tensor | None  # [N, J'] int32: sum of code - weight_zero
    span: int  # inputs that share bytes: one group (padded), or two


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
    if packing.is_arranged(weight_scale):
        span = packing.kernel_span(2 * packed.shape[1] // weight_scale.shape[1])
        return PreparedW4G(packed, weight_scale, weight_zero, weight_sum, span)
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
    span = packing.kernel_span(group_size)
    missing = -in_features % span // group_size  # one, where an odd number of groups goes in pairs
    scale, zero, sums = (
        None if part is None else torch.nn.functional.pad(part, (0, missing)).t().contiguous().t()
        for part in (weight_scale, weight_zero, weight_sum)
    )
    assert scale is not None
    assert zero is not None
    return PreparedW4G(packing.split_for_kernel(packed, span), scale, zero, sums, span)
