"""Judges from other packages, imported only when asked for: LPIPS (torchmetrics), Inception features (torch-fidelity).

Both look for trained weights, and fetch them when they are not in torch's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

INSTALL = "install the extra: pip install 'ditq[eval]'"
INCEPTION = "inception-v3-compat"


def load_lpips() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """LPIPS with AlexNet (arXiv:1801.03924): mean over pairs of images [S, C, H, W] in [-1, 1].

    Raises:
        ImportError: torchmetrics or torchvision is missing.
    """
    try:
        import torchvision  # noqa: F401  torchmetrics needs its AlexNet
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity as Lpips
    except ImportError as error:
        raise ImportError(
            f"--lpips needs torchmetrics and torchvision, which are not both installed; {INSTALL}"
        ) from error
    judge = Lpips(net_type="alex")
    return lambda reference, images: float(judge(rgb(reference), rgb(images)))


def load_inception() -> Callable[[torch.Tensor], torch.Tensor]:
    """Inception pool3 features [S, 2048] of images [S, C, H, W] in [-1, 1].

    Raises:
        ImportError: torch-fidelity is missing.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            f"--fid needs torch-fidelity, which is not installed; {INSTALL}"
        ) from error
    network: Any = FeatureExtractorInceptionV3(INCEPTION, ["2048"])
    return lambda images: torch.cat([network(part)[0] for part in to_uint8(rgb(images)).split(32)])


def rgb(images: torch.Tensor) -> torch.Tensor:
    """Images [S, C, H, W] with one channel repeated to three; others unchanged."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as uint8 in [0, 255]: round(255 (x / 2 + 0.5)), ties to even, as diffusers does."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
