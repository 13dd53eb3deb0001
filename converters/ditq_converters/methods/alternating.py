"""A low-rank branch by alternating optimization (DiTAS, arXiv:2409.07756, Eq. 9-10).

    repeat: Qv = Q(V - L);  L = best rank-r approximation of V - Qv

We depart from the paper in two things. The target V is the smoothed weight, since per-output-channel quantization does
not commute with smoothing. And the best iterate is kept: the low-rank half-step never increases |V - Qv - L|, but a
quantizer whose grid follows its input can. With a grid that stays the error never rises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Quantizer = Callable[[torch.Tensor], torch.Tensor]  # [N, K] fp64 -> its quantized real values


@dataclass(frozen=True)
class AlternatingResult:
    """The kept iterate: V is close to quantize(quantize_target) + lora_up lora_down.

    Attributes:
        quantize_target: [N, K] fp64, what the kept iterate quantized: V less the low-rank part of the step before.
        lora_down: [r, K] fp64, r = min(rank, N, K).
        lora_up: [N, r] fp64.
        errors: Frobenius norm of V - Qv - L after every iteration.
    """

    quantize_target: torch.Tensor
    lora_down: torch.Tensor
    lora_up: torch.Tensor
    errors: tuple[float, ...]


def alternate(
    target: torch.Tensor, quantize: Quantizer, rank: int, iterations: int = 10
) -> AlternatingResult:
    """Split a weight into a quantized and a low-rank part; keep the best iterate, the first of equals.

    Guaranteed: best error <= that of the first iterate <= that of rounding to nearest.

    Args:
        target: [N, K] fp64, V.
        quantize: [N, K] -> quantized real values [N, K], any float dtype.
        rank: of the branch, >= 1; at min(N, K) and beyond the branch takes up the whole error.
        iterations: >= 1; the paper takes 10.

    Raises:
        ValueError: rank or iterations below 1.
    """
    if rank < 1 or iterations < 1:
        raise ValueError(
            f"alternate: rank and iterations must be at least 1, got {rank} and {iterations}"
        )
    quantize_target, errors = target, []
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for _ in range(iterations):
        residual = target - quantize(quantize_target).double()
        lora_down, lora_up = low_rank(residual, rank)
        branch = lora_up @ lora_down
        errors.append(float((residual - branch).norm()))
        if kept is None or errors[-1] < min(errors[:-1]):
            kept = quantize_target, lora_down, lora_up
        quantize_target = target - branch
    assert kept is not None
    return AlternatingResult(*kept, tuple(errors))


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best rank-r approximation U_r S_r Z_r^T as two factors, each with a square root of S_r.

    The singular vectors of the shorter side are the eigenvectors of its Gram matrix: for a transformer's weights many
    times cheaper than a singular value decomposition, and as exact for the leading values.

    Args:
        matrix: [N, K] fp64.
        rank: >= 1.

    Returns:
        lora_down: [r, K] fp64 = S_r^(1/2) Z_r^T, r = min(rank, N, K). lora_up: [N, r] fp64 = U_r S_r^(1/2).
    """
    if matrix.shape[0] < matrix.shape[1]:
        lora_down, lora_up = low_rank(matrix.T, rank)
        return lora_up.T.contiguous(), lora_down.T.contiguous()
    rank = min(rank, matrix.shape[1])
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors  # values rise
    leading = vectors[:, -rank:].flip(1)  # [K, r]
    image = matrix @ leading  # [N, r] = U_r S_r
    root = image.norm(dim=0).sqrt()
    root = torch.where(root > 0, root, torch.ones_like(root))  # a zero column stays zero
    return (leading * root).T.contiguous(), image / root
