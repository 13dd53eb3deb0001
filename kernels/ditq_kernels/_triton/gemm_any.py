"""One GEMM or another, by the weights: int8, progressive int4, or int4 with a real scale per group.

Launches get them as three tensors, codes, group_scale and group_offset, see `gemm_fused.checked_parts`.
"""

from typing import Any

import torch

from ditq_kernels._triton import gemm_w4a8, gemm_w4a8_per_group, gemm_w8a8
from ditq_kernels._triton.parts.epilogue import Epilogue, gemm_launch
from ditq_kernels.launch import tuning


def launch_stages(
    q: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    dequantize: tuple[Any, ...],
    config: tuning.TileConfig | None,
) -> tuple[Epilogue, tuning.TileConfig]:
    """Stages up to the bias and the tiles for more; `dequantize` goes from scale to lora_up."""
    if group_scale is not None:
        op = "gemm_w4a8"
    elif group_offset is None:
        op = "gemm_w8a8"
    else:  # weight scales and zero points are in the sums
        op = gemm_w4a8_per_group.OP
        scale, _, bias, _, _, *branch = dequantize
        dequantize = (scale, None, bias, None, None, *branch)
    return gemm_launch(op, q, *dequantize, config=config, narrow=True)


def run(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    dequantize: tuple[Any, ...],
    out: torch.Tensor,
    epilogue: Epilogue,
    config: tuning.TileConfig,
) -> None:
    """Fill `out` with what the epilogue makes of q times the weights."""
    if group_offset is None:
        gemm_w8a8.run(q, weight, out, epilogue, config)
    elif group_scale is not None:
        gemm_w4a8.run(q, weight, group_scale, group_offset, out, epilogue, config)
    else:
        _, weight_scale, _, zero_point, weight_sum, *_ = dequantize
        gemm_w4a8_per_group.run(
            q, weight, weight_scale, group_offset, zero_point, weight_sum, out, epilogue, config
        )
