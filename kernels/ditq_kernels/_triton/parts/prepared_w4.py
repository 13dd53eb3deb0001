"""Progressive int4 weights as the kernel reads them (`codes.arranged`): as they are, or a kept copy.

Layers hold them in that order. Weights in the file's order get a copy, made once and kept beside them; so do those that
need padding.
"""

from dataclasses import dataclass

import torch

from ditq_kernels.codes import packing
from ditq_kernels.launch.prepared import prepared


@dataclass(frozen=True)
class PreparedW4:
    """Progressive int4 weights in kernel order; groups with channels side by side."""

    split: torch.Tensor  # [N, padded K / 2] uint8, see packing.split_for_kernel
    scale: torch.Tensor  # [N, J] uint8, strides (1, N)
    offset: torch.Tensor  # [N, J] int8, strides (1, N)
    unit: int  # inputs per unit; each half of a unit lies in one group


def prepared_w4(
    packed: torch.Tensor, group_scale: torch.Tensor, group_offset: torch.Tensor
) -> PreparedW4:
    """Weights in kernel order, from the cache if they have not changed.

    Raises:
        RuntimeError: they are not prepared yet and a CUDA graph is being captured.
    """
    if packing.is_arranged(group_scale):
        return PreparedW4(packed, group_scale, group_offset, _unit(packed, group_scale))
    return prepared("gemm_w4a8", (packed, group_scale, group_offset), _prepare)


def _unit(packed: torch.Tensor, group_scale: torch.Tensor) -> int:
    in_features = 2 * packed.shape[1]
    return packing.kernel_unit(in_features, in_features // group_scale.shape[1])


def _prepare(
    packed: torch.Tensor, group_scale: torch.Tensor, group_offset: torch.Tensor
) -> PreparedW4:
    unit = _unit(packed, group_scale)
    scale, offset = (part.t().contiguous().t() for part in (group_scale, group_offset))
    return PreparedW4(packing.split_for_kernel(packed, unit), scale, offset, unit)
