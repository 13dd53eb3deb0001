"""Quantizer of attention heads in plain torch, as `linear`: every line is a few fp32 steps in the defined order."""

import torch

from ditq_kernels.codes import numerics


def quantize_heads(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [B, H, T, D] of x [B, T, H, D], and their scale [B, H, T] where none is given."""
    y = x.float()
    if norm_weight is not None:
        y = _normed(y, norm_weight.float(), eps)
    if cos is not None and sin is not None:
        y = _rotated(y, cos, sin, interleaved)
    y = y.transpose(1, 2)
    if shift is not None:
        y = y - shift[:, :, None]
    if scale is None:
        scales = numerics.symmetric_scale(y.abs().amax(3))
        return numerics.quantize_symmetric(y, scales[..., None]).contiguous(), scales
    step = scale[..., None, None]
    codes = numerics.quantize_asymmetric(y, step, step.new_zeros((), dtype=torch.int32))
    return codes.contiguous(), step.new_empty((0, *codes.shape[1:3]))


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of each head, or of all heads of a token if the weight is as long; the order of torch's."""
    wide = weight.numel() != x.shape[3]
    rows = x.flatten(2) if wide else x
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True).add(eps)) * weight
    return rows.unflatten(2, x.shape[2:]) if wide else rows


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Pairs of channels turned: (a, b) to (a * cos - b * sin, b * cos + a * sin)."""
    cos, sin = (_of_channels(table, x.shape[3], interleaved) for table in (cos, sin))
    if interleaved:
        a, b = x.unflatten(3, (-1, 2)).unbind(4)
        other = torch.stack((-b, a), 4).flatten(3)
    else:
        a, b = x.chunk(2, 3)
        other = torch.cat((-b, a), 3)
    return x * cos + other * sin


def _of_channels(table: torch.Tensor, head_dim: int, interleaved: bool) -> torch.Tensor:
    """[B or 1, T, 1, D] of a table [T or B, T; D or D / 2]."""
    table = table if table.dim() == 3 else table[None]
    if table.shape[2] != head_dim:
        table = table.repeat_interleave(2, 2) if interleaved else table.repeat(1, 1, 2)
    return table[:, :, None]
