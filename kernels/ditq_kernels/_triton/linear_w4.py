"""Float activations times progressive int4 weights; see `weight_only`."""

import torch

from ditq_kernels._triton import weight_only
from ditq_kernels.codes.arranged import in_file_order
from ditq_kernels.launch import tuning


def launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: tuning.TileConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `ops.linear_w4`."""
    packed, group_scale, group_offset = in_file_order("w4p", packed, group_scale, group_offset)
    return weight_only.launch(
        "linear_w4", x, packed, group_scale, group_offset, weight_scale, bias, out_dtype, config
    )
