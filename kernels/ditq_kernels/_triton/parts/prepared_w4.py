"""Progressive int4 weights in the order the kernel reads; `prepared` makes them once a layer.

The file's nibble order would need a byte shuffle per fragment (2.5x the loop instructions on
sm_80), so bytes are permuted once (`packing.split_for_kernel`) and group metadata is transposed into
one word per group and channel. The copy is as large as the packed weights and lives on their device.
"""

from dataclasses import dataclass

import torch

from ditq_kernels.codes import packing
from ditq_kernels.launch.prepared import prepared

WIDE_UNIT, NARROW_UNIT = 128, 64


@dataclass(frozen=True)
class PreparedW4:
    """Progressive int4 weights in kernel order."""

    split: torch.Tensor  # [N, padded K / 2] uint8, see packing.split_for_kernel
    groups: torch.Tensor  # [J, N] int32: group_scale | (group_offset + 128) << 8
    unit: int  # inputs per unit; each half of a unit lies in one group


def kernel_unit(in_features: int, group_size: int) -> int:
    """Inputs per unit: 128, or 64 where 128 would straddle groups or pad."""
    wide = in_features % WIDE_UNIT == 0 and group_size % (WIDE_UNIT // 2) == 0
    return WIDE_UNIT if wide else NARROW_UNIT


def prepared_w4(
    packed: torch.Tensor, group_scale: torch.Tensor, group_offset: torch.Tensor
) -> PreparedW4:
    """Weights in kernel order, from the cache if they have not changed.

    Raises:
        RuntimeError: they are not prepared yet and a CUDA graph is being captured.
    """
    return prepared("gemm_w4a8", (packed, group_scale, group_offset), _prepare)


def _prepare(
    packed: torch.Tensor, group_scale: torch.Tensor, group_offset: torch.Tensor
) -> PreparedW4:
    in_features = 2 * packed.shape[1]
    unit = kernel_unit(in_features, in_features // group_scale.shape[1])
    words = group_scale.to(torch.int32) | ((group_offset.to(torch.int32) + 128) << 8)
    return PreparedW4(packing.split_for_kernel(packed, unit), words.t().contiguous(), unit)
