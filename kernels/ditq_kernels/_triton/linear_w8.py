"""Float activations times int8 weights; see `weight_only`."""

import torch

from ditq_kernels._triton import weight_only
from ditq_kernels.launch import tuning


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: tuning.TileConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `ops.linear_w8`."""
    return weight_only.launch(
        "linear_w8", x, weight, None, None, weight_scale, bias, out_dtype, config
    )
