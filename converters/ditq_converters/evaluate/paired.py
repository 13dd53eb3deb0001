"""Paired measures: images and latents of two models that started from equal noise."""

from __future__ import annotations

import torch
from torch.nn import functional as F

PEAK = 2.0  # images lie in [-1, 1]
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr_db(reference: torch.Tensor, images: torch.Tensor, peak: float = PEAK) -> torch.Tensor:
    """10 log10(peak^2 / mean squared error), image by image.

    Args:
        reference: [S, C, H, W] float.
        images: [S, C, H, W] float.
        peak: distance from black to white.

    Returns:
        [S] fp64 in dB; infinite for equal images.

    Raises:
        ValueError: the shapes differ.
    """
    _check_pair("psnr", reference, images)
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * (peak**2 / error).log10()


def pooled_psnr_db(reference: torch.Tensor, images: torch.Tensor, peak: float = PEAK) -> float:
    """PSNR of the mean squared error over all images: below the mean of `psnr_db`, and steadier."""
    _check_pair("psnr", reference, images)
    error = (images.double() - reference.double()).square().mean()
    return 10 * float((peak**2 / error).log10())


def ssim(reference: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean structural similarity (Wang et al. 2004, Eq. 13) with their 11x11 Gaussian window, sigma 1.5.

    Pixels are first moved to [0, 1], because the luminance term is not shift invariant: L = 1, C1 = 0.01^2,
    C2 = 0.03^2, population moments, and only windows that lie inside the image. Departs from the paper in that every
    channel is compared, and the mean taken, where they take the luminance.

    Args:
        reference: [S, C, H, W] float in [-1, 1], H and W at least 11.
        images: [S, C, H, W] float in [-1, 1].

    Returns:
        [S] fp64, at most 1.

    Raises:
        ValueError: the shapes differ, or the images are smaller than the window.
    """
    _check_pair("ssim", reference, images)
    if min(reference.shape[-2:]) < WINDOW:
        raise ValueError(
            f"ssim: images must be at least {WINDOW}x{WINDOW}, got {tuple(reference.shape)}"
        )
    x, y = reference.double() / 2 + 0.5, images.double() / 2 + 0.5
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x.square()
    var_y = _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return (luminance * structure).flatten(1).mean(1)


def relative_l2(reference: torch.Tensor, latents: torch.Tensor) -> float:
    """|z_q - z| / |z| over all samples [S, C, H, W] together.

    Raises:
        ValueError: the shapes differ.
    """
    _check_pair("relative_l2", reference, latents)
    truth = reference.double()
    return float((latents.double() - truth).norm() / truth.norm())


def _blur(images: torch.Tensor) -> torch.Tensor:
    """[S, C, H, W] fp64 -> [S, C, H - 10, W - 10]: the Gaussian window, as two passes."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=images.device) - WINDOW // 2
    weights = (-offsets.square() / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()
    channels = images.flatten(0, 1)[:, None]  # [S * C, 1, H, W]
    rows = F.conv2d(channels, weights.reshape(1, 1, WINDOW, 1))
    return F.conv2d(rows, weights.reshape(1, 1, 1, WINDOW)).unflatten(0, images.shape[:2])[:, :, 0]


def _check_pair(name: str, reference: torch.Tensor, other: torch.Tensor) -> None:
    if reference.shape != other.shape or reference.ndim != 4:
        raise ValueError(
            f"{name}: needs two equal shapes [S, C, H, W], got {tuple(reference.shape)} and {tuple(other.shape)}"
        )
