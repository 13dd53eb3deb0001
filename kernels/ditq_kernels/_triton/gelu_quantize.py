"""GELU before either quantizer of rows."""

import torch

from ditq_kernels._triton import quantize_per_token, quantize_static


def launch(
    x: torch.Tensor,
    smooth_inv: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    group_shift: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    asymmetric: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments as in `row_fused.gelu_quantize`. What it does not make is empty."""
    if scale is None or zero_point is None:
        return quantize_per_token.launch(
            x, smooth_inv, group_shift, group_index, asymmetric, gelu=True
        )
    codes = quantize_static.launch(
        x, scale, zero_point, smooth_inv, group_shift, group_index, gelu=True
    )
    no_scale = torch.empty(0, dtype=torch.float32, device=x.device)
    return codes, no_scale, torch.empty(0, dtype=torch.int32, device=x.device)
