"""A GEMM that leaves int8 codes of GELU for the next GEMM."""

from typing import Any

import torch

from ditq_kernels._triton import gemm_any
from ditq_kernels._triton.parts.epilogue import GeluCodes
from ditq_kernels.launch import tuning


def launch(
    q: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    group_offset: torch.Tensor | None,
    out_scale: torch.Tensor,
    out_zero_point: torch.Tensor,
    out_smooth_inv: torch.Tensor | None,
    *dequantize: Any,
    config: tuning.TileConfig | None = None,
) -> torch.Tensor:
    """Run the kernel; arguments as in `gemm_fused.gemm_gelu_quantize`, `dequantize` from scale to lora_up."""
    out = torch.empty((q.shape[0], weight.shape[0]), dtype=torch.int8, device=q.device)
    if out.numel() == 0:
        return out
    epilogue, config = gemm_any.launch_stages(q, group_scale, group_offset, dequantize, config)
    stage = GeluCodes(out_scale, out_zero_point, out_smooth_inv)
    gemm_any.run(
        q, weight, group_scale, group_offset, dequantize, out, epilogue._replace(gelu=stage), config
    )
    return out
