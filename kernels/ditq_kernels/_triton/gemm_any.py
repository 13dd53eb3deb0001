"""One GEMM or the other, by the weights: int8, or progressive int4 if there are groups."""

from typing import Any

import torch

from ditq_kernels import tuning
from ditq_kernels._triton import gemm_w4a8, gemm_w8a8
from ditq_kernels._triton.epilogue import Epilogue, gemm_launch


def launch_stages(
    q: torch.Tensor,
    group_scale: torch.Tensor | None,
    dequantize: tuple[Any, ...],
    config: tuning.TileConfig | None,
) -> tuple[Epilogue, tuning.TileConfig]:
    """Stages up to the bias and the tiles for more; `dequantize` goes from scale to lora_up."""
    op = "gemm_w8a8" if group_scale is None else "gemm_w4a8"
    return gemm_launch(op, q, *dequantize, config=config, narrow=True)


def run(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    out: torch.Tensor,
    epilogue: Epilogue,
    config: tuning.TileConfig,
) -> None:
    """Fill `out` with what the epilogue makes of q times the weights."""
    if group_scale is None or group_offset is None:
        gemm_w8a8.run(q, weight, out, epilogue, config)
    else:
        gemm_w4a8.run(q, weight, group_scale, group_offset, out, epilogue, config)
