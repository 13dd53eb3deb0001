"""From a projection to the codes of an attention in one launch: RMS norm, rotary embedding, a shift, int8."""

import torch

from ditq_kernels.checks import heads as checks_heads
from ditq_kernels.ops import dispatch


def quantize_heads(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = True,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize queries or keys, head by head, after their norm and rotary embedding.

    In fp32, nothing is rounded to the dtype of x between the steps:

        y = x * (1 / sqrt(mean(x ** 2) + eps)) * norm_weight      RMS norm (arXiv:1910.07467)
        (a, b) -> (a * cos - b * sin, b * cos + a * sin)          rotary embedding (arXiv:2104.09864)
        y = y - shift
        code = round(y * (1 / scale))

    Without a given scale each head of each token has its own, max|y| / 127, as in `quantize_per_token`; with one the
    codes are those of `quantize_static`. A shift of keys that all tokens of an image share adds one number to
    all logits of a query, which softmax ignores: with the mean of the keys it makes the scales smaller
    (SageAttention, arXiv:2410.02367).

    Args:
        x: [B, T, H, D] fp32 | fp16 | bf16, D contiguous, finite.
        norm_weight: [D]: each head has a norm of its own (Flux, Qwen, SD3). [H * D]: one norm for all heads of a
            token (Wan, LTX), of at most 16384 channels. Any float dtype, contiguous. Absent: no norm.
        cos: [T, C] or [B, T, C] fp32, any strides, C = D or D / 2: a column for each channel or for each pair.
            Complex tables give it as `table.real`. Absent: no rotation.
        sin: the same, in the same layout: `table.imag`.
        eps: of the norm, at least 0.
        interleaved: pairs are channels 2 i and 2 i + 1 (Flux, Qwen, Wan, LTX); else i and i + D / 2 (Cosmos,
            OmniGen, CogView4).
        shift: [B, H, D] fp32, contiguous, subtracted last.
        scale: [H] or [B, H] fp32, positive: a given scale for each head, or for each head of each image.

    Returns:
        codes: [B, H, T, D] int8, contiguous, in [-127, 127], with a given scale in [-128, 127]. scales: [B, H, T]
        fp32; [0, H, T] where a scale is given.

    Raises:
        ValueError: a wrong shape, dtype, device or layout.
    """
    arguments = (x, norm_weight, eps, cos, sin, interleaved, shift, scale)
    if (made := dispatch.quantize_heads.by_plan(arguments)) is not None:
        return made
    checks_heads.check_heads(x, scale)
    checks_heads.check_norm(x, norm_weight, eps)
    checks_heads.check_rotation(x, cos, sin)
    checks_heads.check_centre(x, shift)
    return dispatch.quantize_heads(*arguments)
