"""GELU before either quantizer of rows."""

import torch

from ditq_kernels._triton import quantize_per_token, quantize_static


def launch(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments as in `row_fused.gelu_quantize`. With a given scale the second output is empty."""
    if scale is None or zero_point is None:
        return quantize_per_token.launch(x, smooth_inv, gelu=True)
    codes = quantize_static.launch(x, scale, zero_point, smooth_inv, gelu=True)
    return codes, torch.empty(0, dtype=torch.float32, device=x.device)
