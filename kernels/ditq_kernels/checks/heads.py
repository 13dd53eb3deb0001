"""Checks of the quantizer of attention heads; as in `tensors`, each raises ValueError with one sentence."""

import torch

from ditq_kernels.checks import tensors as checks

OP = "quantize_heads"
MAX_HEADS_TIMES_D = 16384  # of a norm over all heads of a token, which one program holds


def check_heads(x: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Projections [B, T, H, D] whose heads are contiguous, and a scale for each head, or of each image, if any."""
    if x.dim() != 4 or x.dtype not in checks.FLOATS:
        raise ValueError(
            f"{OP}: x must be [B, T, H, D] {checks.names_of(checks.FLOATS)}, got {checks.describe(x)}; "
            "unflatten the heads of the projection"
        )
    if x.stride(3) != 1:
        raise ValueError(
            f"{OP}: heads of x must be contiguous, got strides {tuple(x.stride())}; call .contiguous()"
        )
    if scale is None:
        return
    per_head, per_image = (x.shape[2],), (x.shape[0], x.shape[2])
    if scale.dtype != torch.float32 or tuple(scale.shape) not in (per_head, per_image):
        raise ValueError(
            f"{OP}: scale must be float32 {list(per_head)} or {list(per_image)}, got {checks.describe(scale)}; "
            "pass one for each head, or for each head of each image"
        )
    if not scale.is_contiguous():
        raise ValueError(
            f"{OP}: scale must be contiguous, got strides {scale.stride()}; call .contiguous()"
        )
    checks.check_device(OP, "scale", scale, like=x)


def check_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> None:
    """A weight for each channel of a head, or for all channels of a token."""
    if weight is None:
        return
    heads, head_dim = x.shape[2:]
    if weight.dim() != 1 or weight.numel() not in (head_dim, heads * head_dim):
        raise ValueError(
            f"{OP}: norm_weight must be [{head_dim}] (each head) or [{heads * head_dim}] (all heads of a token), got "
            f"{list(weight.shape)}; pass the weight of the RMS norm"
        )
    if weight.dtype not in checks.FLOATS or not weight.is_contiguous():
        raise ValueError(
            f"{OP}: norm_weight must be contiguous {checks.names_of(checks.FLOATS)}, got "
            f"{checks.describe(weight)}; call .contiguous()"
        )
    if weight.numel() != head_dim and weight.numel() > MAX_HEADS_TIMES_D:
        raise ValueError(
            f"{OP}: a norm over all heads takes at most {MAX_HEADS_TIMES_D} channels, got {weight.numel()}; "
            "norm before, and pass no norm_weight"
        )
    if not eps >= 0:
        raise ValueError(f"{OP}: eps must be at least 0, got {eps}; it is usually 1e-6")
    checks.check_device(OP, "norm_weight", weight, like=x)


def check_rotation(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> None:
    """Both tables or none, for each token, with a column for each channel or for each pair."""
    if (cos is None) != (sin is None):
        missing = "cos" if cos is None else "sin"
        raise ValueError(
            f"{OP}: cos and sin go together, {missing} is missing; pass both or neither"
        )
    if cos is None or sin is None:
        return
    batch, tokens, _, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"{OP}: rotation turns pairs of channels, got D={head_dim}; leave cos out")
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() in (2, 3) and table.shape[-2] == tokens
        fits = fits and table.shape[-1] in (head_dim, head_dim // 2)
        if not fits or (table.dim() == 3 and table.shape[0] not in (1, batch)):
            raise ValueError(
                f"{OP}: {name} must be [{tokens}, D] or [{batch}, {tokens}, D] with D={head_dim} or {head_dim // 2}, "
                f"got {list(table.shape)}; pass the rows of these tokens"
            )
        if table.dtype != torch.float32:
            raise ValueError(
                f"{OP}: {name} must be float32, got {checks.describe(table)}; call .float()"
            )
        checks.check_device(OP, name, table, like=x)
    if cos.shape != sin.shape or cos.stride() != sin.stride():
        raise ValueError(
            f"{OP}: cos and sin must have one shape and layout, got {list(cos.shape)} {tuple(cos.stride())} and "
            f"{list(sin.shape)} {tuple(sin.stride())}; call .contiguous() on both"
        )


def check_centre(x: torch.Tensor, shift: torch.Tensor | None) -> None:
    """A shift for each channel of each head of each image."""
    if shift is None:
        return
    expected = (x.shape[0], *x.shape[2:])
    if tuple(shift.shape) != expected or shift.dtype != torch.float32 or not shift.is_contiguous():
        raise ValueError(
            f"{OP}: shift must be [B, H, D] = {list(expected)} float32, contiguous, got {checks.describe(shift)}; "
            "call .float().contiguous()"
        )
    checks.check_device(OP, "shift", shift, like=x)
