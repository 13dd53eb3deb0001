"""A GEMM that adds its result, gated or not, to the residual stream: one read and one write of the stream."""

from typing import Any

import torch
from triton import language as tl

from ditq_kernels._triton import gemm_any
from ditq_kernels._triton.parts.epilogue import Residual
from ditq_kernels.launch import tuning


def launch(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    residual: torch.Tensor,
    gate: torch.Tensor | None,
    *dequantize: Any,
    config: tuning.TileConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `gemm_fused.gemm_residual`, `dequantize` from scale to lora_up."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=q.device)
    if out.numel() == 0:
        return out
    epilogue, config = gemm_any.launch_stages(q, group_scale, group_offset, dequantize, config)
    stage = Residual(residual, residual.stride(0))
    if gate is not None:
        rows_per_sample = q.shape[0] // gate.shape[0]
        one_sample = tl.constexpr(rows_per_sample % config.block_t == 0)
        stage = Residual(*stage[:2], gate, gate.stride(0), rows_per_sample, one_sample)
    stages = epilogue._replace(residual=stage)
    gemm_any.run(q, weight, group_scale, group_offset, dequantize, out, stages, config)
    return out
